"""Commands whose options may stand in the configuration or in the environment.

Click's own order is ours: command line, environment (`keys.variable`), configuration (click's default_map),
default. The files are read when such a command runs, and by nothing else, so that a file that is wrong keeps
nobody from looking, unmounting or stopping. Not for reading files: `tmem.config.reading`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

from tmem.config import keys, reading
from tmem.config.reading import Config
from tmem.errors import ConfigError


class ConfiguredCommand(click.Command):
    """A command whose options have their defaults in a section of the configuration.

    With `per_client` those of the client that the command line names, in [client.NAME.SECTION], count more.
    `may_go_on` says for a segment that a configuration which is refused shall be a warning.
    """

    def __init__(
        self,
        *arguments: Any,
        section: str,
        per_client: bool = False,
        may_go_on: Callable[[str], bool] = lambda segment: False,
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self._section, self._per_client, self._may_go_on = section, per_client, may_go_on
        for key in keys.of_section(section).values():
            if option := self.option(key.name):
                option.envvar, option.show_envvar = keys.variable(section, key.name), True

    def option(self, name: str) -> click.Option | None:
        """Return the option of the key called `name`."""
        wanted = f"--{name.replace('_', '-')}"
        return next(
            (one for one in self.params if isinstance(one, click.Option) and wanted in one.opts), None
        )

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the context, with what the configuration says as defaults."""
        if parent is not None and not extra.get("resilient_parsing") and not {"-h", "--help"} & {*args}:
            extra["default_map"] = self._defaults(parent, args)
        return super().make_context(info_name, args, parent, **extra)

    def _defaults(self, parent: click.Context, args: list[str]) -> dict[str, object]:
        config, segment = self._load(parent), parent.find_root().obj["name"]
        values = config.section(segment, self._section)
        if self._per_client and config.sources:
            with click.Context(self, parent=parent) as trial:
                given, _, _ = self.make_parser(trial).parse_args([*args])
            if isinstance(client := given.get("client"), str):
                values |= config.section(segment, "client", client, self._section)
        named = {name: self.option(name) for name in values}
        return {str(option.name): values[name] for name, option in named.items() if option is not None}

    def _load(self, parent: click.Context) -> Config:
        try:
            return configuration(parent)
        except ConfigError as error:
            obj = parent.find_root().obj
            if not self._may_go_on(obj["name"]):
                raise
            click.echo(f"tmem: going on without the configuration: {error}", err=True)
            obj["configuration"] = Config()
            return Config()


def configuration(ctx: click.Context) -> Config:
    """Return what the files say, read once for a command line. Raises `ConfigError`."""
    obj = ctx.find_root().obj
    if "configuration" not in obj:
        obj["configuration"] = reading.load(obj.get("config"))
    found = obj["configuration"]
    assert isinstance(found, Config)
    return found


def explicit(ctx: click.Context, name: str) -> bool:
    """Say whether the parameter was given on the command line or in the environment."""
    return ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def setting_of(config: Config, segment: str) -> Callable[[str], Mapping[str, int | str]]:
    """Return the function from a client's name to what the configuration says of it."""
    return lambda client: config.client(segment, client)
