"""The command line: python -m tessera demo | run | doctor."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status. What is expected to go wrong ends in one message on stderr, not in a traceback."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that a server that was started is stopped
    from .cli import comfy_server, demo, doctor, run

    try:
        if options.command == "demo":
            demo.run_demo(options.output, options.models)
        elif options.command == "run":
            run.run_workflow(options.workflow, options.output, options.set)
        else:
            for line in doctor.report():
                print(line)
    except (demo.DemoError, comfy_server.ServerStartError, comfy_server.PromptError, OSError, ValueError) as error:
        print(f"tessera {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tessera", description="Sparse and quantized attention for diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="the built-in text-to-video workflow, dense and accelerated, with all figures")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for videos and pictures (default: %(default)s)")
    demo.add_argument("--models", type=Path, help="folder with diffusion_models/ and vae/ to use instead of the built-in weights")
    run = commands.add_parser("run", help="run an API-format workflow on a headless ComfyUI")
    run.add_argument("workflow", type=Path)
    run.add_argument("--output", type=Path, default=Path("output"), help="folder for what the workflow makes (default: %(default)s)")
    run.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input of the workflow; may be repeated")
    commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
