"""Every command shows examples that it would take, answers to -h, and gives what it reports as JSON."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from extraction_dagster.cli.main import app, load_command

# What is for programs already: OpenMetrics text.
WITHOUT_JSON = {"metrics"}


def tree(command, path=()):
    """Every group and command, by what a user types; those of the first level are loaded when they are asked for."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from tree(below if path else load_command(name), (*path, name))


ROOT = typer.main.get_command(app)
EVERY = dict(tree(ROOT))
COMMANDS = {path: command for path, command in EVERY.items() if not hasattr(command, "commands")}


def examples(command):
    """What the help of a command says that one could type, as words."""
    (said,) = re.findall(r"For example: (.+)", command.help.replace("\n", " ").replace("  ", "\n"))
    return [
        shlex.split(text)[1:] for text in re.split(r",? (?:or|then) |, | > ", said) if text.startswith("extraction")
    ]


def parse(words):
    """Parse a line as the command would, and run nothing; returns the command's path."""
    command, context, path = ROOT, None, ()
    while words:
        context = command.make_context("extraction", [*words], parent=context)
        if not hasattr(command, "commands"):
            return path
        name, command, words = command.resolve_command(context, words)
        path = (*path, name)
    return path if command.make_context("extraction", [], parent=context) else None


def test_there_are_the_commands_that_the_documentation_names():
    assert {" ".join(path) for path in COMMANDS} >= {"run", "points import", "checkpoint set", "frames prune", "show"}
    assert len(COMMANDS) >= 29


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
def test_the_help_has_examples_that_parse(path):
    found = examples(EVERY[path])
    assert found
    for words in found:
        parse(list(words))
    assert any(tuple(words[: len(path)]) == path for words in found)


def test_an_example_with_a_wrong_option_would_be_seen():
    with pytest.raises(Exception, match="No such option: --fast"):
        parse(["run", "--fast"])
    with pytest.raises(Exception, match="No such command 'start'"):
        parse(["start"])
    assert parse(["points", "import", "points.parquet"]) == ("points", "import")


@pytest.mark.parametrize("path", EVERY, ids=" ".join)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_answers_to_both_options_for_help(path, option):
    done = CliRunner().invoke(app, [*path, option], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert f"Usage: extraction {' '.join(path)}".rstrip() in done.stdout
    assert "For example: extraction" in done.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_reports_as_json_and_says_of_each_option_what_it_is_for(path):
    options = {name: parameter for parameter in COMMANDS[path].params for name in parameter.opts}
    assert ("--json" in options) is (path[0] not in WITHOUT_JSON)
    assert [name for name, parameter in options.items() if not getattr(parameter, "help", None)] == []


def test_completion_can_be_installed():
    shown = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "200"}).stdout
    assert "--install-completion" in shown
    assert "--show-completion" in shown
