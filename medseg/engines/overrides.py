"""Name a mistyped override of a bundle, with the nearest right one.

MONAI sets an override whose last word is unknown without a word, and ends in a bare `KeyError` where its parent is
unknown. :func:`check_overrides` stands in a bundle's `initialize` and finds the first kind under
`python -m monai.bundle run`; :class:`CheckedWorkflow` checks before anything is parsed and finds both.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pydoc import locate
from types import FrameType, TracebackType
from typing import Any

import yaml
from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow

from medseg.errors import ConfigError, own_error

#: Parts an id; MONAI takes `::` for the same.
_SEPARATOR = "#"
#: What `monai.bundle run` and ConfigWorkflow take for themselves.
_WORKFLOW_ARGUMENTS = {
    *inspect.signature(ConfigWorkflow).parameters,
    "args_file",
    "workflow_name",
}


def _load(config_file: str | Sequence[str]) -> ConfigParser:
    """Return the config files, merged in order.

    Raises:
        ConfigError: if one is absent or cannot be read as YAML or JSON.
    """
    files = [config_file] if isinstance(config_file, str) else list(config_file)
    for file in files:
        try:
            ConfigParser.load_config_file(file)
        except OSError as error:
            raise ConfigError(f"config_file: {file}: {error.strerror}; name a config of the bundle") from error
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"config_file: {file}: not YAML or JSON ({' '.join(str(error).split())})") from error
    return ConfigParser(ConfigParser.load_config_files(files))


def _keys(config: Any, parent: str = "") -> list[str]:
    """Return every id of a nested config."""
    if isinstance(config, Mapping):
        items: list[tuple[Any, Any]] = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    else:
        return []
    keys = []
    for key, value in items:
        name = f"{parent}{_SEPARATOR}{key}" if parent else str(key)
        keys += [name, *_keys(value, name)]
    return keys


def _takes(component: Mapping[str, Any], argument: str) -> bool:
    """Say whether the class or function named by a component's `_target_` has an argument of that name."""
    if not ConfigComponent.is_instantiable(component):
        return False
    try:
        target = locate(ConfigComponent(dict(component)).resolve_module_name())
        return argument in inspect.signature(target).parameters  # type: ignore[arg-type]
    except (ImportError, TypeError, ValueError):
        return False


def check_config_overrides(config_file: str | Sequence[str], overrides: Mapping[str, Any]) -> None:
    """Refuse an override that no key of the config files answers to.

    An override is right where its id stands in the files, where its parent is a component whose class takes an
    argument of that name, or where another override refers to it as `@id`.

    Args:
        config_file: the config file, or the files that are merged in order.
        overrides: id and value of each override, as on the command line.

    Raises:
        ConfigError: naming the override and the nearest right ones.
    """
    parser = _load(config_file)
    known = _keys(parser.get())
    for key in overrides:
        name = str(key).replace("::", _SEPARATOR)
        if name in known or any(re.search(rf"@{re.escape(name)}(?!\w)", str(v)) for v in overrides.values()):
            continue
        parent, _, leaf = name.rpartition(_SEPARATOR)
        if parent in known and isinstance(component := parser[parent], Mapping) and _takes(component, leaf):
            continue
        near = get_close_matches(name, known, n=3, cutoff=0.6) or get_close_matches(
            leaf, [k for k in known if k.rpartition(_SEPARATOR)[2] == leaf] or known, n=3, cutoff=0
        )
        raise ConfigError(
            f"override --{name}: no such key in {config_file}; the nearest are "
            + ", ".join(f"--{k}" for k in near)
            + "; correct the name, or add the key to the config"
        )


def _frames() -> list[FrameType]:
    frames, frame = [], inspect.currentframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def running_workflow() -> ConfigWorkflow | None:
    """Return the bundle workflow on whose behalf this code is being evaluated, or None outside of one."""
    for frame in _frames():
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, ConfigWorkflow):
            return candidate
    return None


def check_overrides() -> None:
    """Check the overrides of the workflow that is being initialized; to be called from a bundle's `initialize`.

    It also makes medseg's own errors the last line of the process, without a traceback: MONAI wraps whatever goes
    wrong while a config is evaluated into errors that name the expression and not the cause.

    Raises:
        ConfigError: see :func:`check_config_overrides`.
    """
    sys.excepthook = show_error
    for frame in _frames():
        if frame.f_code.co_name == "create_workflow" and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            arguments = frame.f_locals["_args"]
            config_file = frame.f_locals["config_file"]
            check_config_overrides(config_file, {k: v for k, v in arguments.items() if k not in _WORKFLOW_ARGUMENTS})
            return


def show_error(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An exception hook that prints medseg's own error, wherever it is in the chain, as one line."""
    ours = own_error(error)
    if ours is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {ours}", file=sys.stderr)


class CheckedWorkflow(ConfigWorkflow):
    """MONAI's `ConfigWorkflow`, with every override checked before anything is parsed.

    Use it as `python -m monai.bundle run_workflow --workflow_name medseg.engines.CheckedWorkflow --config_file …`.

    Args:
        config_file: the config file, or the files that are merged in order.
        kwargs: the other arguments of `monai.bundle.ConfigWorkflow`, and the overrides.

    Raises:
        ConfigError: naming the override and the nearest right ones; or the file that is not there.
    """

    def __init__(self, config_file: str | Sequence[str], **kwargs: Any) -> None:
        sys.excepthook = show_error
        check_config_overrides(config_file, {k: v for k, v in kwargs.items() if k not in _WORKFLOW_ARGUMENTS})
        super().__init__(config_file=config_file, **kwargs)
