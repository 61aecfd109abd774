"""`HEALTHCHECK` of the encoder's image: exit code 0 when the server in this container answers /readyz with 200."""

import http.client
import os
import sys

TIMEOUT_S = 4.0

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("BENTOML_PORT", "3000")), timeout=TIMEOUT_S)
try:
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
except OSError as error:
    sys.exit(f"not ready: {error}")
sys.exit(None if status == 200 else f"not ready: status {status}")
