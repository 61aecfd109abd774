"""What the flows do, free of Prefect: one concern a module, one vendor a module."""
