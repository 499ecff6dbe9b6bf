"""Whole runs on a GPU: tests of other rooms, collected again here, where they see one."""

from __future__ import annotations

import pytest
import torch

from tests.budget.test_fill import (  # noqa: F401
    test_a_run_fills_its_limit,
    test_learned_scales_are_kept,
)
from tests.budget.test_price_control import (  # noqa: F401
    test_it_ends_at_the_limit,
    test_it_goes_on_with_the_same_bits,
    test_the_file_reads_back_what_training_saw,
    test_where_bits_are_free_it_is_learned_scale_qat,
)
from tests.conftest import compiles, result_of
from tests.cuda.test_bits import pytestmark  # noqa: F401
from tests.quantize.test_fused import test_triton_kernels  # noqa: F401
from tests.runs.test_resume import test_resumed_runs_end_in_the_same_bits  # noqa: F401
from tests.runs.test_storing import (  # noqa: F401
    stored,
    test_gptq_stores_other_codes_on_the_same_grid,
    test_the_solvers_scales_are_made_finer_until_gptq_fills_the_limit,
)
from tests.test_promises import (  # noqa: F401
    RUNS,
    last_seen,
    test_equal_training_gives_equal_bytes_whatever_the_name_and_time,
    test_eval_scores_the_file_alone_as_training_did,
    test_seen_scored_and_stored_weights_are_one,
)
from tests.training.test_averaging import (  # noqa: F401
    test_an_average_survives_a_crash,
    test_the_average_is_what_is_stored,
)
from tests.training.test_training import (  # noqa: F401
    test_a_graph_that_folded_its_first_weights_is_an_error,
    test_liveness_sees_a_snapped_copy_that_is_not_used,
    test_masters_stay_off_the_grid_while_the_model_sees_it,
    test_one_model_graph_before_and_after_the_switch,
    test_priming_leaves_no_trace,
)


def test_runs_are_on_the_gpu(train) -> None:
    """Else nothing here shows anything."""
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert train("qat=int6", "max_steps=2", "run_name=r").code == 0
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before + 100
    assert torch.cuda.get_device_name() in result_of(RUNS / "r")["hardware"]


@compiles
@pytest.mark.slow
def test_a_compiled_run_sees_and_stores_the_same_weights(train) -> None:
    """The model by inductor, snapping by Triton's kernels; nothing is compiled at the switch."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        done = train("qat=int6", "qat.start_step=5", "compile=true", "run_name=r")
    assert done.code == 0, done.err
    row = result_of(RUNS / "r")
    assert row["on_grid_share"] == 1.0
    assert row["val_bpb_snapped"] == pytest.approx(row["val_bpb_artifact"], abs=1e-9)
