"""Every kernel through Triton's own launch, on a GPU that is not there: prints how often each was launched, as JSON.

Run by `test_launched.py` in a process whose Triton is not the interpreter.
"""

import json
from unittest import mock

import torch
import transformers

import fastbert
from bench.stand_in import as_on_a_gpu
from fastbert.distill import attention_loss, capture


def model() -> fastbert.BertModel:
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=50
    )
    return fastbert.BertModel(config).bfloat16().train()


def main() -> None:
    ids, mask = torch.ones(2, 24, dtype=torch.long), torch.ones(2, 24, dtype=torch.long)
    mask[1, 9:] = 0
    with as_on_a_gpu() as launched:
        output = model()(ids, mask, output_attentions=True)
        (output.last_hidden_state.sum() + output.attentions[0].sum()).backward()
        square = torch.zeros(1, 1, 24, 24)
        model()(ids, square, head_mask=torch.ones(2, requires_grad=True)).last_hidden_state.sum().backward()
        apart = model()
        for part in (apart.encoder.layer[0].attention.output, apart.encoder.layer[0].intermediate):
            part.register_forward_hook(lambda *_: None)
        apart(ids).last_hidden_state.sum().backward()
        with mock.patch("fastbert.modules.feed_forward_is_fused", return_value=True):
            model()(ids).last_hidden_state.sum().backward()
        with torch.no_grad():
            model().eval()(ids, mask)
        student, teacher = model(), model()
        with capture(teacher) as theirs, torch.no_grad():
            teacher(ids, mask)
        with capture(student) as ours:
            student(ids, mask)
        attention_loss(ours[0], theirs[0]).backward()
    print(json.dumps(launched))


if __name__ == "__main__":
    main()
