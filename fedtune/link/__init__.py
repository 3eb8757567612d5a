"""The link: a coordinator and its clients over gRPC with mutual TLS, signed statements and resumable transfers."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # TLS 1.3 alone: the one suite named here for 1.2 wants RSA certificates, and ours are ECDSA. gRPC has no switch.
    "GRPC_SSL_CIPHER_SUITES": "AES256-GCM-SHA384",
    "GRPC_VERBOSITY": "NONE",  # fedtune itself says what goes wrong, once and in words
}
"""Variables that gRPC reads when it is first used in a process."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
