"""Without the bars and remarks of the libraries that read a model, which would bury our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import diffusers.utils.logging
import transformers.utils.logging


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of diffusers and transformers, and no progress bars; afterwards as it was."""
    with ExitStack() as after:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            after.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                after.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
