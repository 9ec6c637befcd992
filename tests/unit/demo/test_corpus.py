from itertools import islice

from dpr_lightning.demo.corpus import corpus_documents
from dpr_lightning.demo.tasks import make_rows


def test_the_corpus_depends_on_the_seed_alone() -> None:
    first = list(islice(corpus_documents(seed=1), 200))
    assert first == list(islice(corpus_documents(seed=1), 200))
    assert first != list(islice(corpus_documents(seed=2), 200))


def test_the_corpus_asks_no_held_out_question() -> None:
    questions = {document.split("\n")[0] for document in islice(corpus_documents(seed=0), 3000)}
    for split in ("validation", "test"):
        assert not questions & {row["prompt"] for row in make_rows(num_rows=500, seed=0, split=split)}


def test_the_corpus_mixes_styles_and_running_text() -> None:
    documents = list(islice(corpus_documents(seed=0), 500))
    assert any("\nanswer: " in document for document in documents)
    assert any("\nso it is " in document for document in documents)
    assert any(document.startswith("count: ") for document in documents)


def test_the_clean_part_comes_first_and_ends_in_right_answers() -> None:
    documents = list(islice(corpus_documents(seed=0, num_clean=400), 400))
    sums = [document for document in documents if document.startswith("what is ") and " + " in document.split("?")[0]]
    assert sums
    for document in sums:
        question, _, answer = document.partition("?")
        numbers = [int(word) for word in question.removeprefix("what is ").split(" + ")]
        assert int(answer.split()[-1]) == sum(numbers)
