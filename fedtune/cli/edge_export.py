"""The command `fedtune-edge export`: the tuned model as a LoRA adapter for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedtune.cli.edge_options import DONE, SITE, expect_site


def add_arguments(own: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    own.add_argument("out", metavar="DIR", type=Path, help="a new folder")
    own.add_argument("--site", metavar="SITE", type=Path, default=SITE, help=f"this device's file ({SITE})")
    own.add_argument(
        "--form", choices=("peft", "gguf"), default="peft", help="peft: for transformers; gguf: for llama.cpp (peft)"
    )


def run(options: argparse.Namespace) -> int:
    """Write the adapter, and say how it is used."""
    from fedtune.config.site import bind_site
    from fedtune.edge.base import open_base
    from fedtune.edge.speaker import current_model
    from fedtune.edge.tuned import GGUF_FILE, export_tuned

    expect_site(options.site)
    settings = bind_site(options.site)
    model = current_model(settings, options.site)
    bundle = open_base(settings, source=str(options.site)).bundle
    out = export_tuned(bundle, model.ledger, model.trainable, options.out, form=options.form)
    print(f"wrote {out}: the change of {bundle.base_name} after round {model.ledger.round}, without any of your data")
    if options.form == "gguf":
        print(f"use it with llama.cpp: llama-cli -m BASE.gguf --lora {out / GGUF_FILE}")
    else:
        print(f"use it with PEFT: PeftModel.from_pretrained(model of {bundle.base_name}, {str(out)!r})")
    return DONE
