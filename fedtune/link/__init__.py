"""The link: a coordinator and its clients over gRPC with mutual TLS, signed statements and resumable transfers."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # TLS 1.3 alone: the one suite named here for 1.2 wants RSA certificates, and ours are ECDSA. gRPC has no switch.
    "GRPC_SSL_CIPHER_SUITES": "AES256-GCM-SHA384",
    "GRPC_VERBOSITY": "NONE",  # what goes wrong is told by fedtune, once and in words
}
"""What gRPC reads when it is first used in a process."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
