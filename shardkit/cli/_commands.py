"""All commands. The module of a command is imported when it runs, not for its help."""

import argparse

from ._command import Command, import_late, option

_TIMEOUT = {"type": float, "default": 1800.0}

# The command line is closed: this is the only place to add a command.
COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "train a decoder on text; without CONFIG, the default run",
        import_late("._train"),
        (
            option(
                "--profile",
                metavar="FIRST:LAST",
                help="trace these updates with jax.profiler, e.g. 10:15, into the run's folder",
            ),
        ),
    ),
    Command(
        "report",
        "memory, communication and time of a config, or module:function, on a target",
        import_late("._report"),
        (
            option(
                "--target",
                help="cpu:8, tpu:v5p:4x4x4, gpu:h100:1x8, …; the devices need not be present",
            ),
            option(
                "--chip",
                help="model the time with the figures of v5p, h100, …; cpu:N has none of its own",
            ),
            option(
                "other",
                nargs="?",
                metavar="OTHER.json",
                help="a second saved report: show how it differs from CONFIG, a saved report too",
            ),
            option(
                "--why",
                action="store_true",
                help="what is sent, by the line of code that causes it",
            ),
            option("--html", metavar="FILE", help="save the report as one HTML page"),
            option("--json", metavar="FILE", help="save the report; - prints it"),
            option("--timeout", **_TIMEOUT, help="seconds to wait for the compiler"),
        ),
    ),
    Command(
        "verify",
        "prove that the step's results match a single device on every mesh",
        import_late("._verify"),
        (
            option(
                "--mesh",
                action="append",
                default=[],
                metavar="AXIS=SIZE,…",
                help="a mesh to verify, e.g. --mesh data=2,tensor=4; may be repeated; by default "
                "every shape of the config's axes that uses all devices",
            ),
            option(
                "--steps", type=int, default=3, metavar="K", help="updates with the optimizer (3)"
            ),
            option(
                "--mutations",
                action="store_true",
                help="also inject known bugs, and show the check that finds each",
            ),
        ),
    ),
    Command(
        "plan",
        "rank the meshes for this model on these devices",
        import_late("._plan"),
        (
            option("--target", required=True, help="tpu:v5p:8x8x8, gpu:h100:4x8, …"),
            option("--global-batch", type=int, help="rows of a batch, in place of the config's"),
            option(
                "--compile",
                type=int,
                default=3,
                metavar="K",
                help="compile the best K with the target's compiler (minutes each); 0 for none",
            ),
            option(
                "--overlap",
                type=float,
                default=0.0,
                help="fraction of the communication that is hidden, 0 to 1",
            ),
            option("--json", metavar="FILE", help="save all layouts and their figures"),
            option(
                "--plot",
                metavar="FILE",
                help="draw memory against time: .png or .svg (shardkit[plot])",
            ),
        ),
    ),
    Command(
        "sweep",
        "try all meshes × accumulation × remat of a config, or module:function, and rank them",
        import_late("._sweep"),
        (
            option("--devices", metavar="N,…", help="device counts, e.g. 8 or 2,4,8"),
            option(
                "--axes",
                metavar="A,…",
                help="mesh axes, e.g. data,fsdp,tensor; by default the config's",
            ),
            option("--accumulate", metavar="K,…", default="1", help="micro-batches (1)"),
            option(
                "--remat",
                metavar="NAME;…",
                default="none",
                help="checkpoint policies between semicolons: 'none;full;save:attn_out' (none)",
            ),
            option("--target", help="tpu:v5p:4x4x4, gpu:h100:1x8, …; compiled, not run"),
            option("--verify", action="store_true", help="compare each with one device"),
            option("--time", action="store_true", help="time the updates on simulated devices too"),
            option("--repeats", type=int, default=5, help="repeats of each timed case (5)"),
            option("--out", metavar="FOLDER", help="folder of the rows (sweeps/NAME)"),
            option("--plots", action="store_true", help="also draw PNG and SVG plots"),
            option("--timeout", **_TIMEOUT, help="seconds to wait for one compile of a target"),
        ),
    ),
    Command(
        "plot",
        "plot loss and speed of runs",
        import_late("._tools", "run_plot"),
        (
            option("runs", nargs="+", metavar="RUN", help="folder of a run: runs/default"),
            option(
                "--out",
                default="plot.png",
                metavar="FILE",
                help="file to write: .png, .svg or .html (plot.png)",
            ),
        ),
        takes_config=False,
    ),
    Command(
        "checkpoint",
        "show the checkpoints of a run, or check them for damage",
        import_late("._checkpoint"),
        (
            option(
                "action",
                choices=("inspect", "verify"),
                help="show what is saved, or check it for damage",
            ),
            option("folder", metavar="DIR", help="a run, its checkpoints, or one step"),
            option(
                "--values",
                action="store_true",
                help="with verify: also read every array and compare its fingerprint",
            ),
        ),
        takes_config=False,
    ),
    Command(
        "hardware",
        "list the known chips, with the source of each figure",
        import_late("._tools", "run_hardware"),
        (
            option("names", nargs="*", metavar="CHIP", help="v5p, h100, …; all by default"),
            option("--config", metavar="CONFIG", help="also list the chips of this config file"),
            option(
                "--measure",
                action="store_true",
                help="also measure this machine's CPU, two seconds",
            ),
        ),
        takes_config=False,
    ),
    Command(
        "launch",
        "run a command in several processes on this machine, for tests",
        import_late("._tools", "run_launch"),
        (
            option(
                "-n",
                type=int,
                required=True,
                metavar="N",
                dest="processes",
                help="number of processes",
            ),
            option(
                "--devices", type=int, metavar="D", help="CPU devices to simulate in each process"
            ),
            option(
                "words",
                nargs=argparse.REMAINDER,
                metavar="-- COMMAND",
                help="command of each process: -- shardkit train CONFIG --set ...",
            ),
        ),
        takes_config=False,
    ),
    Command(
        "tokenize",
        "encode text as token shards",
        import_late("._tools", "run_tokenize"),
        (
            option("path", metavar="PATH", help="a folder or a file of text"),
            option("out", metavar="OUT", help="folder for the shards, new or empty"),
            option(
                "--tokenizer",
                metavar="FILE",
                help="JSON file of the tokenizers library; by default bytes",
            ),
            option(
                "--tokens", type=int, default=2**28, metavar="N", help="tokens per shard (2^28)"
            ),
        ),
        takes_config=False,
    ),
    Command(
        "replay",
        "repeat a step that was not finite, and find where it went wrong",
        import_late("._replay"),
        (option("folder", metavar="DUMP", help="RUN/dumps/step-…, or the folder of the run"),),
        takes_config=False,
    ),
)
