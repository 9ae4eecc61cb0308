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


def test_durations():
    assert [progress._duration(s) for s in (3, 61, 3599, 7260)] == ["< 1 min", "1 min", "1 h 0 min", "2 h 1 min"]
