"""Small encoders as the library transformers makes, writes and evaluates them: what ours are compared with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()

FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"} | {
    "distilbert": "DistilBert"
}
ARCHITECTURES = {
    "feature-extraction": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
}
VOCABULARY, CLASSES = 60, 3
PAD = 1


def make(family: str, task: str, directory: Path, **settings: Any) -> torch.nn.Module:
    """A model with random parameters, none of them zero or one, written to `directory`."""
    names = {"vocab_size": VOCABULARY, "max_position_embeddings": 24, "pad_token_id": PAD, "num_labels": CLASSES}
    names |= {"num_labels": 2} if task == "question-answering" else {}
    if family == "distilbert":
        sizes: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        sizes |= {"layer_norm_eps": 1e-5}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**names | sizes | settings)
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family] + ARCHITECTURES[task])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def ids(*shape: int) -> torch.Tensor:
    """Ids of tokens none of which is padding."""
    return torch.randint(PAD + 1, VOCABULARY, shape)


def evaluate(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What it makes of ids [batch, length]; the logits of answers' starts and ends are stacked, [batch, 2, length]."""
    with torch.no_grad():
        found = model(tokens, attention_mask=torch.ones_like(tokens))
    if "start_logits" in found:
        return torch.stack([found.start_logits, found.end_logits], 1)
    return found.logits if "logits" in found else found.last_hidden_state
