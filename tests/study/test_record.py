"""What a record holds."""

from dynasty_lightning.study.record import thinned


def test_history_is_thinned():
    history = [
        {
            "step": i,
            "mean_bits": {"X": 1 / 3},
            "bits": {"layer": {}},
            "speedup_charged": 2.0,
            "loss": 1.0,
            "lambda": None,
        }
        for i in range(1000)
    ]
    thin = thinned(history)
    assert len(thin) == 40
    assert (thin[0]["step"], thin[-1]["step"]) == (0, 999)
    assert [h["step"] for h in thinned(history[:3])] == [0, 1, 2]
    assert [h["step"] for h in thinned(history[:1])] == [0]
    assert thin[0]["bits"] == {"X": 0.333333}
    assert thinned([]) == []
