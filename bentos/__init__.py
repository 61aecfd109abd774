"""What travels in the Bento: text in, vectors out. No torch, no MLflow, no Prefect in here."""
