"""The options of every command. Declaring them imports nothing but argparse."""

import argparse


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit train`."""
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these updates with jax.profiler, e.g. 10:15, into the run's folder",
    )


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit report`."""
    parser.add_argument(
        "--target", help="cpu:8, tpu:v5p:4x4x4, gpu:h100:1x8, …; the devices need not be present"
    )
    parser.add_argument(
        "--chip", help="model the time with the figures of v5p, h100, …; cpu:N has none of its own"
    )
    parser.add_argument(
        "other",
        nargs="?",
        metavar="OTHER.json",
        help="a second saved report: show how it differs from CONFIG, a saved report too",
    )
    parser.add_argument(
        "--why", action="store_true", help="what is sent, by the line of code that causes it"
    )
    parser.add_argument("--html", metavar="FILE", help="save the report as one HTML page")
    parser.add_argument("--json", metavar="FILE", help="save the report; - prints it")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds to wait for the compiler"
    )


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit verify`."""
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=SIZE,…",
        help="a mesh to verify, e.g. --mesh data=2,tensor=4; may be repeated; by default every "
        "shape of the config's axes that uses all devices",
    )
    parser.add_argument(
        "--steps", type=int, default=3, metavar="K", help="updates with the optimizer (3)"
    )
    parser.add_argument(
        "--mutations",
        action="store_true",
        help="also inject known bugs, and show the check that finds each",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit plan`."""
    parser.add_argument("--target", required=True, help="tpu:v5p:8x8x8, gpu:h100:4x8, …")
    parser.add_argument(
        "--global-batch", type=int, help="rows of a batch, in place of the config's"
    )
    parser.add_argument(
        "--compile",
        type=int,
        default=3,
        metavar="K",
        help="compile the best K with the target's compiler (minutes each); 0 for none",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.0,
        help="fraction of the communication that is hidden, 0 to 1",
    )
    parser.add_argument("--json", metavar="FILE", help="save all layouts and their figures")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw memory against time: .png or .svg (shardkit[plot])"
    )


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit sweep`."""
    parser.add_argument("--devices", metavar="N,…", help="device counts, e.g. 8 or 2,4,8")
    parser.add_argument(
        "--axes", metavar="A,…", help="mesh axes, e.g. data,fsdp,tensor; by default the config's"
    )
    parser.add_argument("--accumulate", metavar="K,…", default="1", help="micro-batches (1)")
    parser.add_argument(
        "--remat",
        metavar="NAME;…",
        default="none",
        help="checkpoint policies between semicolons, e.g. 'none;full;save:attn_out' (none)",
    )
    parser.add_argument("--target", help="tpu:v5p:4x4x4, gpu:h100:1x8, …; compiled, not run")
    parser.add_argument("--verify", action="store_true", help="compare each with one device")
    parser.add_argument(
        "--time", action="store_true", help="time the updates on simulated devices too"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each timed case (5)")
    parser.add_argument("--out", metavar="FOLDER", help="folder of the rows (sweeps/NAME)")
    parser.add_argument("--plots", action="store_true", help="also draw PNG and SVG plots")
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="seconds to wait for one compile of a target"
    )


def add_plot_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: runs/default")
    parser.add_argument(
        "--out",
        default="plot.png",
        metavar="FILE",
        help="file to write: .png, .svg or .html (plot.png)",
    )


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit checkpoint`."""
    parser.add_argument(
        "action",
        choices=("inspect", "verify"),
        help="show what is saved, or check it for damage",
    )
    parser.add_argument("folder", metavar="DIR", help="a run, its checkpoints, or one step")
    parser.add_argument(
        "--values",
        action="store_true",
        help="with verify: also read every array and compare its fingerprint",
    )


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit hardware`."""
    parser.add_argument("names", nargs="*", metavar="CHIP", help="v5p, h100, …; all by default")
    parser.add_argument(
        "--config", metavar="CONFIG", help="also list the chips of this config file"
    )
    parser.add_argument(
        "--measure", action="store_true", help="also measure this machine's CPU, two seconds"
    )


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit launch`."""
    parser.add_argument(
        "-n", type=int, required=True, metavar="N", dest="processes", help="number of processes"
    )
    parser.add_argument(
        "--devices", type=int, metavar="D", help="CPU devices to simulate in each process"
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="command of each process: -- shardkit train CONFIG --set ...",
    )


def add_tokenize_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit tokenize`."""
    parser.add_argument("path", metavar="PATH", help="a folder or a file of text")
    parser.add_argument("out", metavar="OUT", help="folder for the shards, new or empty")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="JSON file of the tokenizers library; by default bytes"
    )
    parser.add_argument(
        "--tokens", type=int, default=2**28, metavar="N", help="tokens per shard (2^28)"
    )


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Adds those of `shardkit replay`."""
    parser.add_argument("folder", metavar="DUMP", help="RUN/dumps/step-…, or the folder of the run")
