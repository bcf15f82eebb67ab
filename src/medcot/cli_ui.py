"""The command ``ui``: the pages in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcot.errors import RecipeError
from medcot.terminal import LATEST, open_console, read_choice, reporting

if TYPE_CHECKING:
    from medcot.answering import Choice
    from medcot.ui.app import Setting

_RUNS = Path("runs")


def ui(
    run: Annotated[
        Path | None, typer.Option(help="Run folder whose model answers; by default runs/latest.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of a run: Hub id, folder, GGUF, embedded.")] = None,
    adapter: Annotated[str | None, typer.Option(help="With --model: folder or Hub id.")] = None,
    style: Annotated[
        str | None, typer.Option(help="With --model, its prompt: chat, tutorial or short.", show_default="chat")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs that are shown.")] = _RUNS,
    host: Annotated[str, typer.Option(help="Address; beyond loopback with --password-env only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    password_env: Annotated[
        str | None, typer.Option(help="Name of the secret that visitors must know; their user name is medcot.")
    ] = None,
) -> None:
    """Open the pages: ask, compare, watch runs, look at data. Ctrl-C ends them."""
    with reporting():
        from medcot.ui.app import check_host, load_gradio, opened

        password = find_password(host, password_env)
        check_host(host, password)
        load_gradio()
        setting = build_setting(find_choice(run, model, adapter, style), run, runs, host, password)
        console = open_console()
        with opened(setting, port) as (address, server):
            console.print(f"medcot ui: {address}", highlight=False, markup=False, soft_wrap=True)
            if setting.voice is None:
                console.print("No model: name one with --run or --model to ask it.", highlight=False, markup=False)
            server.run()


def find_password(host: str, password_env: str | None) -> str | None:
    """Return the password that visitors must know.

    Raises:
        RecipeError: a name was given, and there is nothing under it.
    """
    from medcot.secrets import find_endpoint_key

    if password_env is None:
        return None
    found = find_endpoint_key(host, password_env)
    if found is None:
        raise RecipeError(
            f"There is no secret called '{password_env}'",
            "--password-env names a variable that holds the password, so that it stands in no list of processes",
            f"Set it: export {password_env}=… (or put it into the notebook's vault)",
        )
    return found.value


def find_choice(run: Path | None, model: str | None, adapter: str | None, style: str | None) -> Choice | None:
    """Return the model that the options name, else that of the latest run; ``None`` where there is none.

    Raises:
        RecipeError: options that contradict one another.
        ModelError: the run that was named has no adapter.
    """
    from medcot.answering import Choice, choose_run
    from medcot.errors import ModelError
    from medcot.prompt import Style

    if run is not None and model is not None:
        raise RecipeError("--run together with --model", "Either says who answers", "Leave one of them out")
    if model is None and (adapter or style):
        raise RecipeError("--adapter or --style without --model", "A run has its own", "Add --model, or leave them out")
    if model is not None:
        chosen = read_choice(style or Style.CHAT, Style, "--style")
        return Choice(model, adapter, name=adapter or "adapter", style=chosen)
    if run is not None:
        return choose_run(run)
    try:
        return choose_run(LATEST)
    except ModelError:  # none was made yet, or it is training: its curves can be watched all the same
        return None


def build_setting(choice: Choice | None, run: Path | None, runs: Path, host: str, password: str | None) -> Setting:
    """Return what the pages are to show."""
    from medcot.recipe import load_recipe
    from medcot.records import Run
    from medcot.ui.app import Setting
    from medcot.ui.shelf import Shelf
    from medcot.ui.voice import MOST_THINKING, Voice

    shelf = Shelf(runs, run)
    names = shelf.runs()
    named = None if run is None else next((name for name, one in names.items() if one.folder == run.resolve()), None)
    first = named or next(iter(names), None)
    budget = 512
    if (
        choice is not None
        and choice.adapter is not None
        and (recipe := Run(Path(choice.adapter).parent).recipe).is_file()
    ):
        budget = min(MOST_THINKING, load_recipe(recipe).ask.max_new_tokens)
    return Setting(None if choice is None else Voice(choice), shelf, first, budget, host=host, password=password)
