"""Lines in place of a bar, where there is no terminal."""

from twins_fast.train import progress


def test_lines_say_speed_and_time_left(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 31.0, 32.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress(total=240, done=120) as lines:
        for loss in (2.0, 1.5, 1.0):
            lines.step(images_per_second=64.2, metrics={"loss": loss, "frozen_accuracy": 0.25})
        lines.write("epoch 1")
    assert capsys.readouterr().out == "step 122/240: loss 1.500, images/s 64, frozen 25%, 30 min left\nepoch 1\n"


def test_what_was_known_does_not_count_as_fast(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 40.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Progress(100, 0, "image") as lines:
        lines.advance(50, {"clean": "80.0%"}, known=True)
        lines.advance(0.5, {"PGD-10": "50.0%"})
        lines.advance(9.5, {"PGD-10": "51.0%"})
    said = "image 50/100: PGD-10 50.0%, 1 h 6 min left\nimage 60/100: PGD-10 51.0%, 5 min left\n"
    assert capsys.readouterr().out == said


def test_durations():
    assert [progress._duration(s) for s in (3, 61, 3599, 7260)] == ["< 1 min", "1 min", "1 h 0 min", "2 h 1 min"]
