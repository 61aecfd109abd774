"""The exporter of the training line: `python -m flows.exporter` answers Prometheus on port 9105.

It asks the Prefect server of PREFECT_API_URL and the registry of MLFLOW_TRACKING_URI; one of the two is enough. It
imports nothing that trains, and needs about 60 MB.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, start_http_server
from pydantic import ValidationError

from flows.core.line_metrics import LineCollector, Watch
from flows.core.line_sources import PrefectSource, RegistrySource
from flows.core.mlflow_client import SERVER_SCHEMES
from flows.errors import EkibenError, ParamsError, hide_password
from flows.settings import LineSettings

PORT = 9105
HOST = "0.0.0.0"  # who scrapes is on another machine, or in another container
logger = logging.getLogger(__name__)


def open_collector(settings: LineSettings) -> LineCollector:
    """Make what gives the metrics.

    Raises:
        ParamsError: there is no server to ask, or an address is none.
    """
    for name, url in (("PREFECT_API_URL", settings.prefect_url), ("MLFLOW_TRACKING_URI", settings.mlflow_url)):
        if url and not _is_server(url):
            raise ParamsError(
                f"{name} is {hide_password(url)!r}; the exporter asks servers only, such as http://host:4200/api or "
                "http://host:5000: correct or unset it"
            )
    if not settings.prefect_url and not settings.mlflow_url:
        raise ParamsError("there is nobody to ask: set PREFECT_API_URL, MLFLOW_TRACKING_URI, or both")
    prefect = PrefectSource(
        settings.prefect_url,
        auth=settings.prefect_auth.get_secret_value(),
        key=settings.prefect_key.get_secret_value(),
    )
    registry = RegistrySource(
        settings.mlflow_url,
        settings.model_name,
        username=settings.mlflow_username,
        password=settings.mlflow_password.get_secret_value(),
        token=settings.mlflow_token.get_secret_value(),
    )
    return LineCollector(
        prefect=Watch(prefect) if settings.prefect_url else None,
        registry=Watch(registry) if settings.mlflow_url else None,
    )


def _is_server(url: str) -> bool:
    try:
        address = urlsplit(url)
    except ValueError:  # such as half an IPv6 address
        return False
    return address.scheme in SERVER_SCHEMES and bool(address.hostname)


def export_metrics(host: str = HOST, port: int = PORT) -> None:
    """Answer scrapes until SIGTERM or Ctrl-C.

    Raises:
        ParamsError: there is no server to ask, or the port cannot be had.
    """
    try:
        settings = LineSettings()
    except ValidationError as error:
        raise ParamsError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from None
    registry = CollectorRegistry()
    registry.register(open_collector(settings))
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        server, _ = start_http_server(port, host, registry)
    except (OSError, OverflowError) as error:  # the latter: no port has that number
        raise ParamsError(f"port {port} of {host} cannot be had ({error}): choose another with --port") from error
    logger.info("metrics of the line at http://%s:%s/metrics", host, server.server_port)
    ended.wait()
    server.shutdown()
    server.server_close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m flows.exporter`; what is wrong is one line, and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m flows.exporter", description="Metrics of the training line.")
    parser.add_argument("--host", default=HOST, help="address to listen on, default %(default)s: all")
    parser.add_argument("--port", type=int, default=PORT, help="port to listen on, default %(default)s; 0: a free one")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    try:
        export_metrics(options.host, options.port)
    except EkibenError as error:
        sys.stderr.write(f"error: {hide_password(str(error))}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
