"""The command line: python -m tessera demo | run | doctor | offload-plan."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status. What is expected to go wrong ends in one message on stderr, not in a traceback."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that a server that was started is stopped
    from .cli import comfy_server, demo, doctor, offload_plan, run

    try:
        if options.command == "demo":
            demo.run_demo(options.output, options.models)
        elif options.command == "run":
            run.run_workflow(options.workflow, options.output, options.set)
        elif options.command == "offload-plan":
            for line in offload_plan.lines(options.model, options.gb, options.gpu, options.shape, options.tflops, options.gbps, options.passes):
                print(line)
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
    plan = commands.add_parser("offload-plan", help="what a memory budget costs on a GPU, predicted from a weight file")
    plan.add_argument("--model", type=Path, required=True, help="safetensors file of a diffusion model")
    plan.add_argument("--gb", type=float, required=True, help="GB (2**30 bytes) of weights that may be on the GPU at once")
    plan.add_argument("--gpu", help='such as "RTX 3060"')
    plan.add_argument("--shape", default="81x480x832", help="frames x height x width, height x width, or tokens (default: %(default)s)")
    plan.add_argument("--tflops", type=float, help="TFLOP/s that your GPU reaches, instead of the assumption for --gpu")
    plan.add_argument("--gbps", type=float, help="1e9 bytes a second that its link reaches")
    plan.add_argument("--passes", type=int, default=2, help="forward passes of a sampling step: 2 with guidance (default: %(default)s)")
    commands.add_parser("doctor", help="what this machine can run, and why not the rest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
