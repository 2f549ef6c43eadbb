"""The command line: python -m tessera demo | run | doctor | offload-plan | upscale, and more: `--help` lists them."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

DEBUG = "TESSERA_DEBUG"
EPILOG = (
    "Exit status: 0 done; 1 not done, or not all of it, and the last line on stderr says why; 2 a command line that cannot be read; "
    "130 stopped by Ctrl-C; 128 and the number of a signal that stopped it, such as 143 for SIGTERM. "
    f"{DEBUG}=1 in the environment shows where in the code an error happened."
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status (see EPILOG). Whatever goes wrong ends in one message on stderr, after a traceback where TESSERA_DEBUG is set."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter of a file's name is no reason to fail
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # unwinds, so that a server that was started is stopped
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        options.run(options)
    except KeyboardInterrupt as error:
        print(f"tessera {options.command}: stopped", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"tessera {options.command}: {_sentence(error, options)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception, options: argparse.Namespace) -> str:
    """What went wrong, for a user."""
    from .cli.comfy_client import ServerError

    if isinstance(error, OSError) and error.strerror is not None:
        files = [str(file) for file in (error.filename, error.filename2) if file is not None]
        return f"{' and '.join(files)}: {error.strerror}" if files else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return f"the Python package {error.name.partition('.')[0]} is not installed for {sys.executable}; install it with pip"
    if isinstance(error, OSError | ValueError | ServerError):
        return str(error)
    files = [str(value) for value in vars(options).values() if isinstance(value, Path)]
    work = f" at work on {' and '.join(files)}" if files else ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"memory ran out{work}; close other programs, or ask for less at once"
    return (
        f"an error in Tessera itself{work}. Please report it, with the command and the file if you can give it away; "
        f"{DEBUG}=1 before the command shows where it happened"
    )


def _demo(options: argparse.Namespace) -> None:
    from .cli import demo

    demo.run_demo(options.output, options.models)


def _run(options: argparse.Namespace) -> None:
    from .cli import run

    run.run_workflow(options.workflow, options.output, options.set, options.overwrite)


def _offload_plan(options: argparse.Namespace) -> None:
    from .cli import offload_plan

    for line in offload_plan.lines(options.model, options.gb, options.gpu, options.shape, options.tflops, options.gbps, options.passes):
        print(line)


def _hyperspectral(options: argparse.Namespace) -> None:
    from .cli import hyperspectral

    for line in hyperspectral.run(options):
        print(line, flush=True)


def _layers(options: argparse.Namespace) -> None:
    from .cli import layers

    for line in layers.convert(options.source, options.target, options.flatten_groups, options.overwrite):
        print(line)


def _upscale(options: argparse.Namespace) -> None:
    from .cli import diffusion_upscale, upscale

    diffusion = options.diffusion is not None or options.servers is not None
    (diffusion_upscale if diffusion else upscale).run(options)


def _doctor(options: argparse.Namespace) -> None:
    from .cli import doctor

    for line in doctor.report():
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tessera", description="Sparse and quantized attention for diffusion models.", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what)
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "the built-in text-to-video workflow, dense and accelerated, with all figures")
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for videos and pictures (default: %(default)s)")
    demo.add_argument("--models", type=Path, help="folder with diffusion_models/ and vae/ to use instead of the built-in weights")
    run = command("run", _run, "run an API-format workflow on a headless ComfyUI")
    run.add_argument("workflow", type=Path)
    run.add_argument("--output", type=Path, default=Path("output"), help="folder for what the workflow makes (default: %(default)s)")
    run.add_argument(
        "--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input of the workflow, a text as written; may be repeated"
    )
    run.add_argument("--overwrite", action="store_true", help="replace what has the same name (default: numbers go on from the highest there)")
    plan = command("offload-plan", _offload_plan, "what a memory budget costs on a GPU, predicted from a weight file")
    plan.add_argument("--model", type=Path, required=True, help="safetensors file of a diffusion model; of one in parts any part, or the index")
    plan.add_argument("--gb", type=float, required=True, help="GB (2**30 bytes) of weights that may be on the GPU at once")
    plan.add_argument("--gpu", help='such as "RTX 3060"')
    plan.add_argument("--shape", default="81x480x832", help="frames x height x width, height x width, or tokens (default: %(default)s)")
    plan.add_argument("--tflops", type=float, help="TFLOP/s that your GPU reaches, instead of the assumption for --gpu")
    plan.add_argument("--gbps", type=float, help="1e9 bytes a second that its link reaches")
    plan.add_argument("--passes", type=int, default=2, help="forward passes of a sampling step: 2 with guidance (default: %(default)s)")
    cube = command("hyperspectral", _hyperspectral, "super-resolution of a hyperspectral cube (.npy, TIFF) with ESSAformer")
    cube.add_argument("source", type=Path, metavar="IN", help=".npy or TIFF file of three axes; with --convert a checkpoint")
    cube.add_argument("target", type=Path, metavar="OUT", help="file to write: .npy or TIFF, same dtype and layout; with --convert .safetensors")
    cube.add_argument("--model", type=Path, help="ESSAformer .safetensors file")
    cube.add_argument("--convert", action="store_true", help="make OUT of the published checkpoint IN, running nothing that is in it")
    cube.add_argument("--layout", choices=("bands-first", "bands-last"), help="of the array (default: what a TIFF says, else bands-first)")
    cube.add_argument(
        "--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values that the network sees as 0 and 1 (default: 0 and the cube's largest)"
    )
    cube.add_argument("--tile", type=int, default=128, help="side of a patch, input pixels (default: %(default)s)")
    cube.add_argument("--overlap", type=int, default=32, help="input pixels that patches share (default: %(default)s)")
    cube.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (default: %(default)s)")
    cube.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    layered = command("layers", _layers, "convert a layered picture: PSD, OpenRaster, or a folder of PNG files")
    layered.add_argument("source", type=Path, metavar="IN", help=".psd, .psb or .ora file, or a folder with layers.json")
    layered.add_argument("target", type=Path, metavar="OUT", help=".psd, .ora, or no ending for a folder of PNG files")
    faint = "make of each pass-through group below 100 %% opacity, which .ora has not, a normal group or one layer that looks the same"
    layered.add_argument("--flatten-groups", action="store_true", help=faint)
    layered.add_argument("--overwrite", action="store_true", help="replace OUT if it is a file that exists; a folder never is")
    upscale = command("upscale", _upscale, "enlarge a picture, a folder of pictures or a video, patch by patch")
    upscale.add_argument("source", type=Path, metavar="IN", help="picture, folder of pictures, or video")
    upscale.add_argument("target", type=Path, metavar="OUT", help="file of type .png .jpg .webp .tif .mp4 .mov .mkv .webm; a folder for a folder")
    size = upscale.add_mutually_exclusive_group(required=True)
    size.add_argument("--factor", type=float, help="times as wide and as high; need not be whole")
    size.add_argument("--megapixels", type=float, help="millions of pixels")
    size.add_argument("--size", metavar="NAME", help="as large as fits: HD, Full HD, QHD, 4K UHD or 8K UHD; turned for what is upright")
    upscale.add_argument("--model", default="catanet", help="catanet (built in), bicubic, or a .safetensors or .pth file (default: %(default)s)")
    upscale.add_argument("--tile", type=int, default=256, help="side of a patch, in pixels before upscaling (default: %(default)s)")
    upscale.add_argument("--overlap", type=int, default=32, help="pixels that neighbouring patches share (default: %(default)s)")
    upscale.add_argument("--workers", type=int, metavar="N", help="processes, spread over the GPUs (default: one a GPU, this one without)")
    upscale.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process; on CPUs, equal results need equal numbers")
    upscale.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help="compute on a Ray cluster: at this address, or the one that runs here")
    upscale.add_argument("--overwrite", action="store_true", help="replace what is there already")
    diffusion = upscale.add_argument_group("diffusion", "a video in chunks of time, each by a ComfyUI server; --workers are servers then")
    diffusion.add_argument("--diffusion", type=Path, metavar="WORKFLOW", help="API-format workflow with one Patch Upscale Video node")
    diffusion.add_argument("--servers", metavar="URL,URL", help="running ComfyUI servers with these nodes (default: started here, one a GPU)")
    diffusion.add_argument("--chunk", type=int, default=33, metavar="FRAMES", help="frames that the model gets at once (default: %(default)s)")
    diffusion.add_argument("--chunk-overlap", type=int, default=8, metavar="FRAMES", help="that chunks share (default: %(default)s)")
    command("doctor", _doctor, "what this machine can run, and why not the rest")
    return parser


if __name__ == "__main__":
    sys.exit(main())
