"""`gptoss VERB ...`: finds the verb's module, parses its options, turns errors into one line and an
exit code.

A verb is a module with a dataclass `Arguments` (its options, documented) and `run(arguments)`. Exit
codes: 0 done, 1 could not, 2 wrong usage, 130 interrupted.
"""

import importlib
import os
import sys

from gptoss_jax import libtpu

VERBS = {
    "generate": ("gptoss_jax.cli.generate", "answer one prompt, or continue raw text"),
    "chat": ("gptoss_jax.cli.chat", "talk to the model in the terminal"),
    "serve": ("gptoss_jax.cli.serve", "an OpenAI-compatible server, and a page to talk to"),
    "batch": ("gptoss_jax.cli.batch", "a file of requests in OpenAI's batch format, also on Ray"),
    "convert": ("gptoss_jax.cli.convert", "checkpoint to Orbax, or Orbax to Hugging Face's layout"),
    "bench": ("gptoss_jax.cli.bench", "how fast here, and what share of what the machine allows"),
    "plan": ("gptoss_jax.cli.plan", "does it fit on devices not rented yet, and how fast"),
    "inspect": ("gptoss_jax.cli.inspect", "what a checkpoint holds, lacks, and weighs"),
    "finetune": ("gptoss_jax.cli.finetune", "train an adapter, or the parameters, on your data"),
    "export": ("gptoss_jax.cli.export", "an adapter for peft, or merged into its base for others"),
    "eval": ("gptoss_jax.cli.eval", "held-out accuracy of gpt-oss-tiny"),
}

USAGE = """usage: gptoss VERB [options]        gptoss VERB --help for the options of a verb

OpenAI's gpt-oss models in JAX. Without --model the verbs use gpt-oss-tiny, the model in the
package.

{verbs}

  --traceback   show the whole story of an error
  --version     show the version"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv
    argv = [word for word in argv if word != "--traceback"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(
            USAGE.format(
                verbs="\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
            )
        )
        return 0 if argv else 2
    if argv[0] == "--version":
        from gptoss_jax import __version__

        print(f"gptoss_jax {__version__}")
        return 0
    if argv[0] not in VERBS:
        print(f"gptoss: no verb {argv[0]!r}: use one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return _run(argv[0], argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if traceback:
            raise
        print(f"gptoss {argv[0]}: {_who()}{_one_line(error)}", file=sys.stderr)
        return 1


def _who() -> str:
    """Which of several processes this is, if it is not the one that speaks."""
    hosts = sys.modules.get("gptoss_jax.hosts")
    place = hosts and hosts.place()
    return f"{place}: " if place and place.index else ""


def _run(verb: str, argv: list[str]) -> int:
    libtpu.hush()
    module = importlib.import_module(VERBS[verb][0])
    import tyro

    if hasattr(module, "expand"):  # options from a file
        argv = module.expand(argv)
    arguments = tyro.cli(
        module.Arguments, prog=f"gptoss {verb}", description=module.__doc__, args=argv
    )
    from gptoss_jax.cli.processes import together

    with together(verb, arguments):
        return module.run(arguments) or 0


def _one_line(error: Exception) -> str:
    from gptoss_jax.errors import GptOssError

    text = " ".join(str(error).split())
    if isinstance(error, GptOssError | OSError):
        return text
    return f"unexpected {type(error).__name__}: {text} (--traceback shows where)"


if __name__ == "__main__":
    sys.exit(main())
