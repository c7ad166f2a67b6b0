"""The table of cases notices faults in the kernels: each fault planted here makes the named case fail."""

import pytest
import torch

from tests.helpers.kernel_calls import bias_grids, bias_table, filter_table, wrong_results
from tests.helpers.kernel_programs import FLOATS_ONLY, PLAIN, Manner, changed_sources, kernel_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# fault: (operator, file, text, its replacement, a case that fails)
MUTANTS = {
    "padding_off_by_one": ("upfirdn2d", "upfirdn2d.h", "start = j * axis.down - axis.pad;",
                           "start = j * axis.down - axis.pad + 1;", "even_taps_float64"),
    "rows_below_the_image_are_read": (
        "upfirdn2d", "upfirdn2d.h", "smaller(floor_div(axis.taps - reach.tap + up - 1, up), axis.in - reach.first)",
        "floor_div(axis.taps - reach.tap + up - 1, up)", "even_taps_float64"),
    "columns_right_of_the_image_are_read": ("upfirdn2d", "upfirdn2d.h", "larger(smaller(end, h.in), lo)",
                                            "larger(end, lo)", "even_taps_float64"),
    "channels_right_of_the_image_are_read": ("upfirdn2d", "upfirdn2d.h", "col < 0 || col >= h.in;", "col < 0;",
                                             "even_taps_float64_channels_last"),
    "filter_never_turned": ("upfirdn2d", "upfirdn2d.h", "from[c.reversed ? kx * ky - 1 - i : i] * gain",
                            "from[i] * gain", "even_taps_float64"),
    "filter_of_the_general_body_never_turned": ("upfirdn2d", "upfirdn2d.h",
                                                "turn_x + sign * (across.tap + p * h.up)", "across.tap + p * h.up",
                                                "different_taps_float64"),
    "gain_forgotten": ("upfirdn2d", "upfirdn2d.h", "from_y[c.reversed ? ky - 1 - i : i] * gain;",
                       "from_y[c.reversed ? ky - 1 - i : i];", "separable_float64"),
    "second_phase_a_sample_early": ("upfirdn2d", "upfirdn2d.h", "filtered_phase<K>(from + 1 - tap0,",
                                    "filtered_phase<K>(from,", "up2_odd_pad_float64"),
    "last_columns_left_out": ("upfirdn2d", "upfirdn2d.h", "for (int32_t o = whole + b.tx(); o < cols; o += b.nx)",
                              "for (int32_t o = whole + b.tx(); o < whole; o += b.nx)", "separable_float64"),
    "no_sync_between_the_stages": ("upfirdn2d", "upfirdn2d.h", "b.sync();\n    walk = at;", "walk = at;",
                                   "even_taps_float64"),
    "clamp_passes_gradients": ("bias_act", "bias_act.h",
                               "return CLAMPS ? where_within(out, static_cast<A>(widen(narrow<T>(limit))), result)",
                               "return CLAMPS ? result", "lrelu_clamp_float64_1"),
    "bias_of_the_next_row": ("bias_act", "bias_act.h", "biases[row % c.bias_size]",
                             "biases[(row + 1) % c.bias_size]", "lrelu_biased_float64_0"),
    "last_element_left_out": ("bias_act", "bias_act.h", "for (int32_t i = whole + b.tx(); i < cols; i += b.nx)",
                              "for (int32_t i = whole + b.tx(); i + 1 < cols; i += b.nx)",
                              "relu_1x2x1025_float64_0"),
    "sign_of_the_gain_ignored": ("bias_act", "bias_act.h", "A(gain < 0 ? -1 : 1)", "A(1)",
                                 "lrelu_clamp_gain_no_bias_float64_1"),
    "second_derivative_of_tanh_has_the_wrong_sign": ("bias_act", "bias_act.h", "slope : -2 * t * slope",
                                                     "slope : 2 * t * slope", "tanh_float64_2"),
}
# The table's rows of bias_act are as short as a few threads' numbers, so grids of other sizes are added.
TABLES = {"upfirdn2d": filter_table(torch.float64),
          "bias_act": [*bias_table(torch.float64), *(call for call in bias_grids() if call.x.dtype == torch.float64)]}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unchanged")
    return kernel_program(folder, *PLAIN, csrc=changed_sources(folder, FLOATS_ONLY))


def test_table_without_a_fault_passes(program):
    for calls in TABLES.values():
        assert wrong_results(calls, program.run([call.order(Manner()) for call in calls])) == []


@pytest.mark.parametrize("fault", MUTANTS)
def test_table_notices_the_fault(program, tmp_path, fault):
    op, name, old, new, case = MUTANTS[fault]
    csrc = changed_sources(tmp_path, FLOATS_ONLY, (name, old, new))
    faulty = kernel_program(tmp_path, *PLAIN, csrc=csrc, objects=program.objects_but(op))
    calls = TABLES[op]
    wrong = wrong_results(calls, faulty.run([call.order(Manner()) for call in calls]))
    assert case in [line.split(":")[0] for line in wrong], f"{fault}: {case} passes; those fail: {wrong}"
