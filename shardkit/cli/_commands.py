"""All commands. The module of a command is imported when it runs, not for its help."""

import argparse

from ._command import CONFIG, Command, field_option, import_late, option

_TIMEOUT = {"type": float, "default": 1800.0}

# The command line is closed: this is the only place to add a command.
COMMANDS: tuple[Command, ...] = (
    Command(
        "train",
        "train a decoder on text; without CONFIG, the default run",
        import_late("._train"),
        (
            field_option("--steps", "train.steps", "N"),
            field_option("--lr", "optimizer.lr", "RATE"),
            field_option("--batch-size", "data.batch_size", "ROWS"),
            field_option("--seq-len", "data.seq_len", "N"),
            field_option("--mesh", "mesh", "AXIS=SIZE,…"),
            field_option("--strategy", "strategy", "NAME|NAME"),
            field_option("--devices", "devices", "TARGET"),
            field_option("--seed", "train.seed", "N"),
            field_option("--name", "name", "NAME"),
            option(
                "--profile",
                metavar="FIRST:LAST",
                help="trace these updates with jax.profiler, e.g. 10:15, into the run's folder",
            ),
        ),
        examples=(
            "shardkit train",
            "shardkit train nano --steps 20",
            "shardkit train nano --mesh data=8,tensor=1 --lr 1e-3",
            "shardkit train fsdp_tensor --set train.steps=50 --set model.num_layers=2",
            "shardkit train --set data.path=book.txt --set train.loggers=tensorboard",
        ),
    ),
    Command(
        "report",
        "memory, communication and time of a config, or module:function, on a target",
        import_late("._report"),
        (
            field_option("--mesh", "mesh", "AXIS=SIZE,…"),
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
            option(
                "--trace",
                metavar="FILE",
                help="save the modelled timeline of the step, for Perfetto or chrome://tracing",
            ),
            option(
                "--profile",
                metavar="DIR",
                help="a profile of this step (train --profile, jax.profiler): its measured times "
                "beside the modelled ones",
            ),
            option("--timeout", **_TIMEOUT, help="seconds to wait for the compiler"),
        ),
        examples=(
            "shardkit report nano",
            "shardkit report nano --mesh data=8,tensor=1 --why",
            "shardkit report llama2_7b --target tpu:v5p:4x4x4 --html report.html",
            "shardkit report nano --chip v5p --trace step.json",
            "shardkit report nano --profile runs/nano/profile",
            "shardkit report mine:make_step --target cpu:8 --json report.json",
            "shardkit report old.json new.json",
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
        examples=(
            "shardkit verify",
            "shardkit verify nano --mesh data=4,tensor=2 --mesh data=1,tensor=2",
            "shardkit verify nano --steps 1 --mutations",
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
        examples=(
            "shardkit plan llama2_7b --target tpu:v5p:4x4x4 --compile 0",
            "shardkit plan llama2_7b --target gpu:h100:4x8 --global-batch 128 --plot plan.png",
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
        examples=(
            "shardkit sweep nano --devices 8 --axes data,fsdp,tensor",
            "shardkit sweep nano --devices 8 --accumulate 1,2 --remat 'none;full' --verify --plots",
            "shardkit sweep nano --target tpu:v5p:2x2x2",
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
        examples=("shardkit plot runs/default runs/nano --out loss.svg",),
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
        examples=(
            "shardkit checkpoint inspect runs/default",
            "shardkit checkpoint verify runs/default --values",
        ),
    ),
    Command(
        "convert",
        "a Hugging Face folder to a checkpoint, or with --like a checkpoint to such a folder",
        import_late("._convert"),
        (
            option("source", metavar="FROM", help="a Hugging Face folder; with --like a run"),
            option("out", metavar="OUT", help="the new folder"),
            option(
                "--target-mesh",
                metavar="AXIS=SIZE,…",
                help="mesh whose shards the checkpoint is written in, e.g. fsdp=4,tensor=2; it can "
                "be restored onto any",
            ),
            option(
                "--like",
                metavar="HF_DIR",
                help="export: the folder whose config, tokenizer, dtypes and files to take",
            ),
            option(
                "--vocab-padding",
                type=int,
                default=0,
                metavar="N",
                help="rows of the tables that no token has, model.vocab_padding (0)",
            ),
            option(
                "--ignore",
                action="append",
                default=[],
                metavar="KEY",
                help="key of config.json that is known to change no number, model.ignore",
            ),
        ),
        takes_config=False,
        examples=(
            "shardkit convert llama runs/llama --target-mesh fsdp=4",
            "shardkit convert runs/llama llama-tuned --like llama",
        ),
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
        examples=(
            "shardkit hardware",
            "shardkit hardware v5p h100",
            "shardkit hardware --measure",
        ),
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
        examples=(
            "shardkit launch -n 2 --devices 4 -- shardkit train nano --set train.step_timeout=60",
        ),
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
        examples=(
            "shardkit tokenize docs tokens",
            "shardkit tokenize docs tokens --tokenizer tokenizer.json",
        ),
    ),
    Command(
        "shards",
        "check token shards for damage, every byte",
        import_late("._tools", "run_shards"),
        (option("paths", nargs="+", metavar="PATH", help="folders or files of token shards"),),
        takes_config=False,
        examples=("shardkit shards tokens/",),
    ),
    Command(
        "replay",
        "repeat a step that was not finite, and find where it went wrong",
        import_late("._replay"),
        (option("folder", metavar="DUMP", help="RUN/dumps/step-…, or the folder of the run"),),
        takes_config=False,
        examples=("shardkit replay runs/default",),
    ),
    Command(
        "config",
        "show every field of a config: its value, type, default, and what set it",
        import_late("._setup", "run_config"),
        (option("action", choices=("show",), help="show the fields"), *CONFIG),
        takes_config=False,
        examples=("shardkit config show", "shardkit config show nano --set train.steps=50"),
    ),
    Command(
        "init",
        "copy the shipped configs into a folder, to be changed",
        import_late("._setup", "run_init"),
        (option("folder", metavar="DIR", help="new, or without files of their names"),),
        takes_config=False,
        examples=("shardkit init configs",),
    ),
    Command(
        "completion",
        "print the script that completes commands, options and fields in a shell",
        import_late("._setup", "run_completion"),
        (option("shell", choices=("bash", "zsh"), help="the shell"),),
        takes_config=False,
        examples=(
            "shardkit completion bash > ~/.shardkit-completion && . ~/.shardkit-completion",
            "shardkit completion zsh > ~/.shardkit-completion && . ~/.shardkit-completion",
        ),
    ),
)
