"""The command ``serve``: it reads words, calls ``serving``, and blocks until it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medcot.errors import RecipeError, one_of
from medcot.terminal import LATEST, open_console, read_choice, reporting


def serve(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run folder; Hub id, folder or GGUF.")] = str(
        LATEST
    ),
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter of MODEL, or NAME=ADAPTER for one more to be asked for by name. Repeatable."),
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="Prompt of a MODEL: chat, tutorial or short.", show_default="the run's, or chat")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; any but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "MEDCOT_API_KEY",
    slots: Annotated[
        int | None, typer.Option(min=1, help="Answers written together.", show_default="64 on a GPU, 16 on a CPU")
    ] = None,
    queue: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait; then 429.", show_default="4 a slot")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=16, help="Tokens of prompt and answer together.", show_default="4096, or the model's"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer, thinking included, unless a request says otherwise.")
    ] = 2048,
    think_tokens: Annotated[
        int | None, typer.Option(min=0, help="Budget for thinking, which is then closed.", show_default="none")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="Of draws.", show_default="the model's, or 0.6")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Of draws.", show_default="the model's, or 0.95")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of a request, waiting included.")] = 600,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Seconds that answers have left at a stop.")] = 30,
    precision: Annotated[
        str | None, typer.Option(help="How weights are held.", show_default="the run's, or auto")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What writes: auto (vllm where it is installed and there is a GPU), local or vllm.")
    ] = "auto",
) -> None:
    """Serve a run's base and tuned model, or any model, in OpenAI's protocol."""
    with reporting():
        from dataclasses import replace

        from medcot import serving
        from medcot.prompt import Style
        from medcot.secrets import OTHER_ENDPOINT_KEY, find_endpoint_key
        from medcot.stages import Precision

        if engine not in (engines := ["auto", *serving.Engine]):
            raise RecipeError(f"--engine {engine}", *one_of(engine, engines))
        own, more = _split_adapters(adapter or [])
        who = serving.choose(target, own, engine=serving.find_engine() if engine == "auto" else serving.Engine(engine))
        if own is not None and who.adapter != own:
            raise RecipeError(f"--adapter {own} with a run", "A run has its adapter", f"Name it: --adapter NAME={own}")
        if style is not None:
            chosen = read_choice(style, Style, "--style")
            if who.source != target:
                raise RecipeError("--style with a run", "A run is asked in the style it learned", "Leave it out")
            who = replace(who, style=chosen)
        if precision is not None:
            who = replace(who, precision=read_choice(precision, Precision, "--precision").value)
        key = find_endpoint_key("", api_key_env)
        if key is None and api_key_env != OTHER_ENDPOINT_KEY:
            raise RecipeError(
                f"--api-key-env {api_key_env}, and there is no such secret",
                "It names the environment variable, or the notebook's secret, that holds the key",
                f"Make one: export {api_key_env}=$(openssl rand -hex 24)",
            )
        wish = serving.Wish(
            who,
            more,
            host=host,
            port=port,
            slots=slots,
            context_tokens=context,
            waiting=queue,
            max_tokens=max_tokens if context is None else min(max_tokens, context),
            think_tokens=think_tokens,
            temperature=temperature,
            top_p=top_p,
            seconds=timeout,
            drain_seconds=drain_seconds,
            api_key=key.value if key else None,
            api_key_name=api_key_env,
        )
        serving.serve(wish, console=open_console())


def _split_adapters(given: list[str]) -> tuple[str | None, dict[str, str]]:
    """Return the adapter without a name, and those with one."""
    named = dict(text.split("=", 1) for text in given if "=" in text and not Path(text).exists())
    plain = [text for text in given if "=" not in text or Path(text).exists()]
    if len(plain) > 1:
        raise RecipeError(
            f"--adapter {' and '.join(plain)}", "One adapter goes by 'tuned'", "Name the others: --adapter NAME=ADAPTER"
        )
    return (plain[0] if plain else None), named
