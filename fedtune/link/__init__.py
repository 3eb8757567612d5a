"""The link: a coordinator and its clients over gRPC with mutual TLS, signed statements and resumable transfers."""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {
    # TLS 1.3 alone: the one suite named here for 1.2 wants RSA certificates, and ours are ECDSA. gRPC has no switch.
    "GRPC_SSL_CIPHER_SUITES": "AES256-GCM-SHA384",
    # fedtune itself reports what fails, once and in its own words.
    "GRPC_VERBOSITY": "NONE",
}
"""Variables that gRPC reads when it is first used in a process."""

# gRPC reads them once, and would go on with TLS 1.2 without a word; `server` refuses to start then.
SET_IN_TIME = "grpc" not in sys.modules or "GRPC_SSL_CIPHER_SUITES" in os.environ

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
