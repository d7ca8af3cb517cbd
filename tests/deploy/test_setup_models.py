"""The models that set-up prepares."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.paths import ROOT


def test_a_model_is_current_only_with_todays_recipe(setup: SimpleNamespace, tmp_path: Path) -> None:
    assert not setup.models.is_current("tiny", tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(setup.models.recipe("tiny")))
    assert setup.models.is_current("tiny", tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "tiny", "recipe": 0}))
    assert not setup.models.is_current("tiny", tmp_path)


def test_an_interrupted_model_leaves_the_old_one_and_no_scraps(
    setup: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("old")

    def dies(target: Path, progress: object) -> None:
        (target / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setitem(setup.models.BUILDERS, "tiny", dies)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises(KeyboardInterrupt):
        setup.models.prepare(["tiny"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert (tmp_path / "tiny" / "config.json").read_text() == "old"


def test_every_model_has_a_plain_bfloat16_config(setup: SimpleNamespace) -> None:
    for name in setup.models.RECIPES:
        config = json.loads((ROOT / ".models" / name / "config.json").read_text())
        assert config["dtype"] == "bfloat16", name
        assert config["architectures"][0] in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"), name
        assert "quantization_config" not in config, name


def test_the_tiny_gemma_has_the_groups_of_the_real_one(setup: SimpleNamespace) -> None:
    def read(name: str) -> dict[str, object]:
        config: dict[str, object] = json.loads((ROOT / ".models" / name / "config.json").read_text())
        return config

    tiny, real = read("tiny-gemma3"), read("gemma-3-270m")
    assert tiny["sliding_window"] == real["sliding_window"] == 512
    assert tiny["layer_types"] == real["layer_types"][:12]  # type: ignore[index]
    assert tiny["num_key_value_heads"] == 2  # tensor parallelism of 2


def test_gemmas_terms_lie_beside_its_weights() -> None:
    gemma = ROOT / ".models" / "gemma-3-270m"
    notice = (gemma / "NOTICE").read_text()
    assert "Gemma is provided under and subject to the Gemma Terms of Use" in notice
    assert "modified" in notice
    assert "Gemma Terms of Use" in (gemma / "GEMMA_TERMS.html").read_text()


@pytest.mark.parametrize("name", ["tiny", "tiny-gemma3"])
def test_the_byte_tokenizer_has_one_token_a_byte(setup: SimpleNamespace, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / ".models" / name)
    text = "Straße \n\t日本 <|im_end|>"
    ids = tokenizer(text).input_ids
    assert ids == [257, *"Straße \n\t日本 ".encode(), 260]
    assert tokenizer.decode(ids[1:]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_gemmas_tokenizer_begins_prompts_and_chats_with_one_bos() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / ".models" / "gemma-3-270m")
    assert tokenizer("The capital of France").input_ids[0] == tokenizer.bos_token_id
    messages = [{"role": "user", "content": "What is the capital of France? "}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == "<bos>user: What is the capital of France?\nassistant:"
    assert tokenizer(chat, add_special_tokens=False).input_ids.count(tokenizer.bos_token_id) == 1
