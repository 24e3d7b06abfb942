"""All commands. The module of a command is imported when it runs, not for its help."""

import argparse

from ._command import CONFIG, Command, field_option, flag, import_late, option, value

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
            value(
                "--profile",
                "FIRST:LAST",
                "trace these updates with jax.profiler, e.g. 10:15, into the run's folder",
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
            value(
                "--target",
                "TARGET",
                "cpu:8, tpu:v5p:4x4x4, gpu:h100:1x8, …; the devices need not be present",
            ),
            value(
                "--chip",
                "CHIP",
                "model the time with the figures of v5p, h100, …; cpu:N has none of its own",
            ),
            value(
                "other",
                "OTHER.json",
                "a second saved report: show how it differs from CONFIG, a saved report too",
                nargs="?",
            ),
            flag("--why", "what is sent, by the line of code that causes it"),
            value("--html", "FILE", "save the report as one HTML page"),
            value("--json", "FILE", "save the report; - prints it"),
            value(
                "--trace",
                "FILE",
                "save the modelled timeline of the step, for Perfetto or chrome://tracing",
            ),
            value(
                "--profile",
                "DIR",
                (
                    "a profile of this step (train --profile, jax.profiler): its measured times "
                    "beside the modelled ones"
                ),
            ),
            value("--timeout", "TIMEOUT", "seconds to wait for the compiler", **_TIMEOUT),
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
            value(
                "--mesh",
                "AXIS=SIZE,…",
                (
                    "a mesh to verify, e.g. --mesh data=2,tensor=4; may be repeated; by default "
                    "every shape of the config's axes that uses all devices"
                ),
                action="append",
                default=[],
            ),
            value("--steps", "K", "updates with the optimizer (3)", type=int, default=3),
            flag("--mutations", "also inject known bugs, and show the check that finds each"),
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
            value("--target", "TARGET", "tpu:v5p:8x8x8, gpu:h100:4x8, …", required=True),
            value(
                "--global-batch",
                "GLOBAL_BATCH",
                "rows of a batch, in place of the config's",
                type=int,
            ),
            value(
                "--compile",
                "K",
                "compile the best K with the target's compiler (minutes each); 0 for none",
                type=int,
                default=3,
            ),
            value(
                "--overlap",
                "OVERLAP",
                "fraction of the communication that is hidden, 0 to 1",
                type=float,
                default=0.0,
            ),
            value("--json", "FILE", "save all layouts and their figures"),
            value("--plot", "FILE", "draw memory against time: .png or .svg (shardkit[plot])"),
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
            value("--devices", "N,…", "device counts, e.g. 8 or 2,4,8"),
            value("--axes", "A,…", "mesh axes, e.g. data,fsdp,tensor; by default the config's"),
            value("--accumulate", "K,…", "micro-batches (1)", default="1"),
            value(
                "--remat",
                "NAME;…",
                "checkpoint policies between semicolons: 'none;full;save:attn_out' (none)",
                default="none",
            ),
            value("--target", "TARGET", "tpu:v5p:4x4x4, gpu:h100:1x8, …; compiled, not run"),
            flag("--verify", "compare each with one device"),
            flag("--time", "time the updates on simulated devices too"),
            value("--repeats", "REPEATS", "repeats of each timed case (5)", type=int, default=5),
            value("--out", "FOLDER", "folder of the rows (sweeps/NAME)"),
            flag("--plots", "also draw PNG and SVG plots"),
            value(
                "--timeout", "TIMEOUT", "seconds to wait for one compile of a target", **_TIMEOUT
            ),
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
            value("runs", "RUN", "folder of a run: runs/default", nargs="+"),
            value(
                "--out", "FILE", "file to write: .png, .svg or .html (plot.png)", default="plot.png"
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
            value("folder", "DIR", "a run, its checkpoints, or one step"),
            flag("--values", "with verify: also read every array and compare its fingerprint"),
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
            value("source", "FROM", "a Hugging Face folder; with --like a run"),
            value("out", "OUT", "the new folder"),
            value(
                "--target-mesh",
                "AXIS=SIZE,…",
                (
                    "mesh whose shards the checkpoint is written in, e.g. fsdp=4,tensor=2; it can "
                    "be restored onto any"
                ),
            ),
            value(
                "--like",
                "HF_DIR",
                "export: the folder whose config, tokenizer, dtypes and files to take",
            ),
            value(
                "--vocab-padding",
                "N",
                "rows of the tables that no token has, model.vocab_padding (0)",
                type=int,
                default=0,
            ),
            value(
                "--ignore",
                "KEY",
                "key of config.json that is known to change no number, model.ignore",
                action="append",
                default=[],
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
            value("names", "CHIP", "v5p, h100, …; all by default", nargs="*"),
            value("--config", "CONFIG", "also list the chips of this config file"),
            flag("--measure", "also measure this machine's CPU, two seconds"),
        ),
        takes_config=False,
        examples=("shardkit hardware", "shardkit hardware v5p h100", "shardkit hardware --measure"),
    ),
    Command(
        "launch",
        "run a command in several processes on this machine, for tests",
        import_late("._tools", "run_launch"),
        (
            value("-n", "N", "number of processes", type=int, required=True, dest="processes"),
            value("--devices", "D", "CPU devices to simulate in each process", type=int),
            value(
                "words",
                "-- COMMAND",
                "command of each process: -- shardkit train CONFIG --set ...",
                nargs=argparse.REMAINDER,
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
            value("path", "PATH", "a folder or a file of text"),
            value("out", "OUT", "folder for the shards, new or empty"),
            value("--tokenizer", "FILE", "JSON file of the tokenizers library; by default bytes"),
            value("--tokens", "N", "tokens per shard (2^28)", type=int, default=2**28),
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
        (value("paths", "PATH", "folders or files of token shards", nargs="+"),),
        takes_config=False,
        examples=("shardkit shards tokens/",),
    ),
    Command(
        "replay",
        "repeat a step that was not finite, and find where it went wrong",
        import_late("._replay"),
        (value("folder", "DUMP", "RUN/dumps/step-…, or the folder of the run"),),
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
        (value("folder", "DIR", "new, or without files of their names"),),
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
