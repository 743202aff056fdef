"""The command ``studio``."""

import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from prompt_diffusion.cli.generation import DEFAULT_MODEL, DeviceOption
from prompt_diffusion.cli.shared import say_errors


@say_errors
def studio(
    model: Annotated[
        str, typer.Option(help="What is chosen at first: models:/NAME@ALIAS, models:/NAME/VERSION, or a folder.")
    ] = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default lets nobody but this machine use the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="<int>", help="Port to listen on.")] = 7860,
    device: DeviceOption = "auto",
) -> None:
    """Open a page in the browser: generate, edit and compare, with any registered model; Ctrl-C ends it.

    Example: prompt-diffusion studio --port 7860
    """
    if find_spec("gradio") is None:
        raise ValueError("the studio needs the extra 'studio': run `pip install '.[studio]'` in the checkout")
    from prompt_diffusion.settings import load_settings
    from prompt_diffusion.studio.serve import choose_password, serve

    settings = load_settings()
    password, is_drawn = choose_password(settings, host)
    if is_drawn:
        print(
            f"prompt-diffusion: listening on {host}: the page asks for a password (any user name), this time {password}; "
            "PROMPT_DIFFUSION_STUDIO_PASSWORD sets one that stays",
            file=sys.stderr,
            flush=True,
        )
    serve(
        settings,
        model,
        host,
        port,
        device,
        password,
        lambda address: print(f"studio: {address} (Ctrl-C ends it)", flush=True),
    )
