"""Commands and examples of README and of the pages behind it, for the tests that run them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
# Where README's commands, examples and figures went that are too many for a first page.
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("recipes", "data", "hub", "numbers")]
README = "\n".join([FIRST_PAGE, *(page.read_text(encoding="utf-8") for page in PAGES)])


def find_commands(part: str = "", *, text: str = README) -> list[list[str]]:
    """Returns the tokens of every command in the bash blocks of `text` that contains `part`."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("#") and part in line]


def find_arguments(part: str, **replacements: object) -> list[str]:
    """
    Returns what follows the script or module of README's only command that contains `part`.

    Args:
        part: As for [`find_commands`].
        replacements: Values to put in the place of flags' values, or of other tokens equal to the name.
    """
    (tokens,) = find_commands(part)
    start = next(index for index, token in enumerate(tokens) if token.startswith("recipes"))
    arguments = tokens[start + 1 :]
    for index, token in enumerate(arguments):
        for name, value in replacements.items():
            if token == f"--{name}":
                arguments[index + 1] = str(value)
            elif token == name:
                arguments[index] = str(value)
    return arguments


def find_example(part: str, *, text: str = README) -> str:
    """Returns the only Python block of `text` that contains `part`."""
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if part in block]
    return block
