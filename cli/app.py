"""The command `blip2-search`, and the one place where an error becomes a sentence and an exit code.

Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import inspect
import io
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..indexes.errors import Blip2SearchError
from . import compact, demo, evaluate, index, info, models, options, query, render, train, verify


class ErrorBoundary(TyperGroup):
    """Runs the commands: what they raise on purpose ends here.

    A closed pipe (`| head`) passes through: typer ends the program quietly. So does a bug, with its
    traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            render.say("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (Blip2SearchError, OSError) as error:
            if options.is_verbose():
                traceback.print_exc(file=sys.stderr)
            render.say(f"error: {error}")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=ErrorBoundary,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: it starts in half the time and keeps the examples as written
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from blip2_search import __version__

        typer.echo(f"blip2-search {__version__}")
        raise typer.Exit


def start(
    verbose: options.VerboseOption = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Search photographs by describing them, with BLIP-2.

    Examples:
      blip2-search demo                    see it work on a few photographs
      blip2-search index ~/Pictures        once, and again after changes
      blip2-search query "a clock tower"   from anywhere

    `blip2-search COMMAND --help` has examples for each command.
    """
    options.start_logging()
    options.set_verbose(verbose)


def _help(command: Callable[..., None]) -> str:
    """Return a docstring with its lists marked as not to be wrapped."""
    text = inspect.cleandoc(command.__doc__ or "")
    for heading in ("\nExamples:", "\nRecipes:", "\nLayouts under --root:"):
        text = text.replace(heading, f"\n\n\b{heading}")
    return text


app.callback(help=_help(start))(start)
for _command in (
    index.index, query.query, info.info, verify.verify, compact.compact, models.models, demo.demo,
    train.train, evaluate.evaluate,
):  # fmt: skip
    app.command(help=_help(_command))(_command)


def main() -> None:
    """Run the command line; the entry point of the installed program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a table in a terminal that knows no é
    app(prog_name="blip2-search")


if __name__ == "__main__":
    main()
