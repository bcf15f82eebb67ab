"""The command ``push``: it reads words, calls ``publishing``, and prints what went or what would go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medcot.terminal import LATEST, open_console, read_choice, reporting

if TYPE_CHECKING:
    from rich.console import Console

    from medcot.hub import Delivery
    from medcot.publishing import Plan

_SHORT_SHA = 16


def push(
    repo: Annotated[str, typer.Option(help="Repository: owner/name. Created if need be.")],
    folder: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")] = LATEST,
    what: Annotated[
        str, typer.Option(help="As of export --to: adapter, merged-16bit, -32bit or -4bit, gguf:q8_0,q4_k_m, ollama.")
    ] = "adapter",
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else private.")] = False,
    verify: Annotated[
        str, typer.Option(help="Read back: hash (as the Hub reports it), small (and small files), download (all).")
    ] = "small",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go; send nothing, ask no network.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan or result as JSON, nothing else.")] = False,
) -> None:
    """Push an artefact of a run to the Hugging Face Hub: in one commit, private, read back and compared."""
    with reporting(hint="The same command again goes on with it"):
        from medcot import publishing
        from medcot.hub import Verify
        from medcot.records import Run
        from medcot.train.progress import RunConsole

        way = read_choice(verify, Verify, "--verify")
        console = open_console()
        screen = RunConsole(console)
        kinds = [part.strip() for part in what.split(",") if part.strip()]
        run = Run(folder.resolve() if folder.is_symlink() else folder)
        if dry_run:
            plan = publishing.plan_push(run, repo, kinds, public=public)
            if as_json:
                _print_json(describe_plan(plan))
                return
            print_plan(plan, console)
            for note in plan.notes:
                screen.warn(note)
            return

        def tell(words: str) -> None:
            typer.echo(words, err=True) if as_json else screen.warn(words)

        found = publishing.push(run, repo, kinds, public=public, verify=way, tell=tell)
        if as_json:
            from dataclasses import asdict

            _print_json(asdict(found))
        else:
            print_delivery(found, verify, console)


def describe_plan(plan: Plan) -> dict[str, object]:
    """Return a plan in plain JSON, every checksum whole."""
    return {
        "repo": plan.repo,
        "kind": ", ".join(plan.kinds),
        "private": plan.private,
        "bytes": plan.num_bytes,
        "files": [
            {
                "path": parcel.name,
                "bytes": parcel.num_bytes,
                "sha256": parcel.sha256,
                "from": None if isinstance(parcel.source, bytes) else str(parcel.source),
            }
            for parcel in plan.parcels
        ],
        "notes": list(plan.notes),
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Print what a push would send, a line a file."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for parcel in plan.parcels:
        made = "made for it" if isinstance(parcel.source, bytes) else parcel.source.parent.name + "/"
        sha256 = f"{parcel.sha256[:_SHORT_SHA]}…"
        table.add_row(Text(parcel.name), _size(parcel.num_bytes), sha256, Text(made))
    visible = "private" if plan.private else "public"
    head = f"{', '.join(plan.kinds)} to {plan.repo} ({visible}): {len(plan.parcels)} files, {_size(plan.num_bytes)}"
    console.print(Text(head, "bold"), soft_wrap=True)
    console.print(table)
    console.print("Nothing was sent; --json prints the checksums whole.", style="dim")


def print_delivery(found: Delivery, verify: str, console: Console) -> None:
    """Print where it is now, and what is known of it."""
    from rich.text import Text

    visible = "private" if found.private else "public"
    if found.num_changed or found.removed:
        sent = f"{found.num_changed} of {found.num_files} files sent in one commit"
    else:
        sent = f"all {found.num_files} files were there already; no commit was made"
    removed = f"; older files removed: {', '.join(found.removed)}" if found.removed else ""
    checked = f"hashes of all files compared, {found.num_downloaded} downloaded and compared"
    mark = "ok" if console.options.ascii_only else "✓"
    console.print(Text.assemble((f"{mark} ", "green"), (found.url, "bold"), f" ({visible})"), soft_wrap=True)
    console.print(Text(f"  {sent}{removed}"), soft_wrap=True)
    console.print(Text(f"  commit {found.commit}; {checked}"), soft_wrap=True)
    if verify != "download" and found.num_downloaded < found.num_files:
        console.print("  --verify download would prove the bytes of the large ones too", style="dim", soft_wrap=True)


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _print_json(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
