"""A card can be read whatever the names in it are."""

import ast
import re

from huggingface_hub import ModelCard

from publishing.card import CardSubject, write_card
from publishing.report import write_results

NAME = 'a$b$|<i>`c`"_d_'
RESULTS = {
    **dict.fromkeys(["base_wer", "eval_wer", "base_cer", "eval_cer"], 0.5),
    **dict.fromkeys(["others_base_wer", "others_eval_wer", "others_base_cer", "others_eval_cer"], 0.5),
    "base_eval_speakers": ["안나", "x|y\n<b>", "`z`"],
    "total_parameters": 10,
    "trainable_parameters": 5,
    "train_runtime": 1.0,
    "train_seconds": 60.0,
}


def test_no_name_breaks_a_card(tmp_path):
    folder = tmp_path / NAME
    write_results(folder, RESULTS)
    subject = CardSubject(
        dataset="home`|$1$",
        split="te|st",
        description="A recogniser.",
        base='me"\\`base`',
        command="run --speaker_id 'a\n```\n# b'",
    )
    write_card(folder, subject)

    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == NAME
    lines = card.text.splitlines()
    assert r"# a\$b\$\|\<i\>\`c\`" + '"\\_d\\_' in lines
    assert "# b'" in lines  # inside the block of code, whose fence is longer than the one in it
    assert [line for line in lines if line.startswith("````")] == ["````bash", "````"]
    rows = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
    assert {len(row) for row in rows} <= {4, 6}  # two columns or four, and what is outside
    others = next(row for row in rows if "the base's speakers" in row[1])
    assert others[1].strip() == r"`` home`\|$1$ ``, split `te\|st`, the base's speakers 안나, x\|y\\n\<b\>, \`z\`"
    code = re.search(r"```python\n(.*?)```\n", card.text, flags=re.DOTALL)[1]
    strings = {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}
    assert {NAME} <= strings
