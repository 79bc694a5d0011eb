"""Requests over replicas: who is free takes more, rows arrive at rank 0, a bad one fails alone, a run is resumed."""

import json
from pathlib import Path

import pytest
from torch.distributed import HashStore

from dataset.sample import Dataset, Sample
from executor.commands.generate.spread import Spread
from executor.errors import UserError
from executor.parallel.groups import Group, Parallel
from tests.cases import mostly_long
from tests.parallel.jobs import REPO, case, run_ranks

SAMPLES = [Sample(f"s{index}", ({"role": "user", "content": f"question {index}"},)) for index in range(9)]


def dataset(samples: list[Sample]) -> Dataset:
    return Dataset(Path("questions"), samples)


def spreads(*samples: list[Sample]) -> list[Spread]:
    store, size = HashStore(), len(samples)
    return [
        Spread(Parallel(world=Group(rank, size, "h"), replicas=Group(rank, size, "h"), store=store), dataset(each))
        for rank, each in enumerate(samples)
    ]


def test_whoever_is_free_takes_the_next() -> None:
    first, second = spreads(SAMPLES, SAMPLES)
    assert first.start([1, 2, 4, 5, 8]) and second.start()
    assert (first.max_held, second.max_held) == (3, 3)
    one, two = first.samples(), second.samples()
    assert [next(one), next(two), next(two), next(two)] == [(i, SAMPLES[i]) for i in (1, 2, 4, 5)]
    assert [*one] == [(8, SAMPLES[8])] and [*two] == []
    received: list[dict] = []
    first.receive(received.append)
    second.receive(received.append)
    assert received == []
    second.send({"index": 2, "text": "ü"})
    second.send({"index": 5})
    first.receive(received.append)
    first.receive(received.append)
    assert received == [{"index": 2, "text": "ü"}, {"index": 5}]


def test_other_questions_on_another_node_are_refused() -> None:
    first, second = spreads(SAMPLES, SAMPLES[:-1])
    first.start([1])
    with pytest.raises(UserError, match="copy the same files to every node"):
        second.start()


FORMS = [("qwen2_5_vl", {}), ("qwen3_vl_moe", {"moe_ep_size": 2})]


@pytest.mark.parametrize("family, degrees", mostly_long(FORMS, FORMS[1:]))  # whose replicas wait for each other
def test_one_ordered_file_with_a_bad_row_and_a_resume(tmp_path, family, degrees) -> None:
    media, results = REPO / "dataset/media", tmp_path / "answers.jsonl"
    pictures = [*(str(media / name) for name in ("objects.png", "word.png", "number.jpg")), "later.png"] * 3
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": "What?", "image": name}) + "\n" for name in pictures))
    told = case(family, 2, attn_tp_size=1, **degrees)
    del told["generation_config"]["logprobs"]
    told["data_config"] = {"dataset": "jsonl", "dataset_path": str(questions), "results_path": str(results)}

    later = {"file": str(media / "objects_2.jpg"), "as": str(tmp_path / "later.png")}
    found, again, nothing = run_ranks(2, [told, told | {"before": later}, told], tmp_path)
    rows, after = ([json.loads(line) for line in run["results"].splitlines()] for run in (found, again))
    assert (found["status"], [row["index"] for row in rows]) == (2, list(range(12)))
    assert [row["error"] is None for row in rows] == [True, True, True, False] * 3
    assert len({rows[index]["text"] for index in (0, 4, 8)}) == 1, "the same question has the same answer everywhere"

    assert (again["status"], [row["index"] for row in after]) == (0, list(range(12)))
    assert [row for row in after if row["index"] % 4 != 3] == [row for row in rows if row["error"] is None]

    assert (nothing["status"], len(nothing["answers"])) == (0, 12)
    assert nothing["results"] == again["results"] == results.read_text()
    assert nothing["loads"] == [], "no weights are read for nothing"
