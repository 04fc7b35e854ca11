"""`verify` finds faults planted in the real code, by the right check, and names the place.

Each fault changes one line of a mixer, an op, the state or the files. `where` is what the named check must say; checks
listed as `quiet` must stay green, so that a fault is not found by everything at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_cases import tiny_model
from turbos.model import checkpoint, lm, mixers, state
from turbos.ops import attention, conv, loss, moe, selective_scan, ssd
from turbos.verify import native
from verify_cases import SHAPES, Fault, certificate, check_named, failed, plant, saved

TRUTH, WHOLE = "float64 truth, each sublayer", "float64 truth, whole"
PACKED, BATCH, DECODE = "packed == separate", "batch == single", "prefill == decode"
SEGMENTS, FORKS = "segmented == whole prefill", "forked and restored == live"
TRAINED, GRADIENTS = "parameters present, used, trained", "gradients: packed == separate"
TRUE_GRADIENTS = "gradients: float64 truth"


FAULTS = {
    "dropped D": Fault(
        *(mixers.Mamba2, "forward", "torch.addcmul(y_THP, x_THP, self.D.to(x_THP.dtype)[:, None])", "y_THP"),
        *(TRUTH, "sublayers.0 (Mamba2, model.layers.0): gated norm|(as if D were left out)"),
        quiet=(PACKED, DECODE, SEGMENTS),
    ),
    "swapped B and C": Fault(
        *(mixers.Mamba2, "forward", "x_TI, B_TX, C_TX = xBC_TC.split", "x_TI, C_TX, B_TX = xBC_TC.split"),
        *(TRUTH, "sublayers.0 (Mamba2, model.layers.0): B |(as if B and C were swapped)"),
        quiet=(PACKED, DECODE),
    ),
    "B and C swapped in decode only": Fault(
        *(mixers.Mamba2, "_scan", "B_TGN.to(wide), C_TGN.to(wide), state", "C_TGN.to(wide), B_TGN.to(wide), state"),
        *(DECODE, "sublayers.0 (Mamba2, model.layers.0): scan "),
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "conv leaks between documents": Fault(
        *(mixers.Mamba2, "_convolve", "self.conv_bias, call.documents)[0]"),
        "self.conv_bias, type(call.documents).from_lengths([call.documents.total]))[0]",
        *(PACKED, "sublayers.0 (Mamba2, model.layers.0): conv |first in document 1, token 0"),
        quiet=(TRUTH, WHOLE, "causality"),
    ),
    "scan leaks between documents": Fault(
        *(ssd, "_states_before", "before[: tiles.rounds[0]] = 0"),
        "before[: tiles.rounds[0]] = write_CHPN.sum(0)",
        *("causality", "sublayers.0 (Mamba2, model.layers.0): scan "),
    ),
    "conv state not carried": Fault(
        *(mixers.Mamba2, "_convolve", "state.conv_BKC.copy_(rows)", "pass"),
        *(DECODE, "sublayers.0 (Mamba2, model.layers.0): conv "),
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "scan state dropped between segments": Fault(
        *(mixers.Mamba2, "_scan", "call.documents, state.ssm_BHPN, self", "call.documents, None, self"),
        *(SEGMENTS, "sublayers.0 (Mamba2, model.layers.0): scan |document 0, token 1"),
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "off by one in the cache": Fault(
        *(mixers.Attention, "_attend", "lengths_B = call.positions_T + 1", "lengths_B = call.positions_T"),
        *(DECODE, "sublayers.2 (attention, model.layers.1): attention |is not finite"),
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "stale keys and values": Fault(
        *(mixers.Attention, "_attend", "state.write(k_TKE, v_TKE, "),
        "state.write(k_TKE, state.v_BSKE[call.documents.index_T, call.positions_T] if call.step else v_TKE, ",
        *(DECODE, "sublayers.2 (attention, model.layers.1): attention "),
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "a fork keeps the keys of an empty cache": Fault(
        *(state.HybridState, "_map", "type(layer)(*map(change, layer.tensors))"),
        "type(layer)(*map(change, (t.mul(t.shape[1] != self.max_len) for t in layer.tensors)))",
        *(FORKS, "sublayers.2 (attention, model.layers.1): attention |document 0"),
        quiet=(TRUTH, WHOLE, PACKED, BATCH, DECODE, SEGMENTS),
    ),
    "clamped dt": Fault(
        *(mixers.Mamba2, "forward", "dt_TH = F.softplus(dt_TH.to(wide) + self.dt_bias.to(wide))"),
        "dt_TH = F.softplus(dt_TH.to(wide) + self.dt_bias.to(wide)).clamp(min=2.0)",
        *(TRUTH, "sublayers.0 (Mamba2, model.layers.0): dt |(as if dt were at least 2e+00)"),
        quiet=(PACKED, DECODE),
    ),
    "dt clamped in prefill only": Fault(
        *(mixers.Mamba2, "_scan", "x_THP, dt_TH, A_H, B_TGN, C_TGN, call.documents, None,"),
        "x_THP, dt_TH.clamp(min=2.0), A_H, B_TGN, C_TGN, call.documents, None,",
        *(DECODE, "sublayers.0 (Mamba2, model.layers.0): scan "),
        quiet=(PACKED,),
    ),
    "bf16 router": Fault(
        *(mixers.Experts, "forward", "F.linear(x_TD.to(wide), self.router_weight.to(wide))"),
        "F.linear(x_TD.bfloat16(), self.router_weight.bfloat16()).to(wide)",
        *(TRUTH, "sublayers.1 (mixture of experts, model.layers.0): router logits |computed in bfloat16"),
    ),
    "a missing norm": Fault(
        *(lm.Sublayer, "forward", "rms_norm(x_TD, self.norm_weight, self.eps)"),
        'x_TD if self.kind == "A" else rms_norm(x_TD, self.norm_weight, self.eps)',
        *(TRUTH, "sublayers.2 (attention, model.layers.1): norm |(as if the norm were left out)"),
        quiet=(PACKED, DECODE),
    ),
    "a missing gated norm": Fault(
        *(mixers.Mamba2, "forward", "y_TI = gated_rms_norm("),
        "y_TI = (lambda y, z, *rest: y * F.silu(z))(",
        *(TRUTH, "sublayers.0 (Mamba2, model.layers.0): gated norm |(as if the norm were left out)"),
    ),
    "a missing final norm": Fault(
        *(lm.LanguageModel, "forward", "rms_norm(x_TD, self.norm_weight, self.config.norm_eps)", "x_TD"),
        *(TRUTH, "final norm"),
    ),
    "a transposed expert": Fault(
        *(mixers.Experts, "_mix", "self.w_in, self.w_out"),
        "torch.cat([self.w_in[:1].transpose(1, 2), self.w_in[1:]]), self.w_out",
        *(TRUTH, "sublayers.1 (mixture of experts, model.layers.0): routed experts "),
        quiet=(PACKED, DECODE),
    ),
    "gate and up halves swapped": Fault(
        *(moe, "activate", "gate, up = hidden_SF.chunk(2, dim=-1)", "up, gate = hidden_SF.chunk(2, dim=-1)"),
        *(TRUTH, "sublayers.1 (mixture of experts, model.layers.0): "),
    ),
    "selection bias ignored": Fault(
        *(mixers.Experts, "_route", 'if config.bias_update == "off" else self.selection_bias', "if True else 0"),
        *(TRUTH, "sublayers.1 (mixture of experts, backbone.layers.1): gates "),
        shape="nemotron",
    ),
    "positions start again in decode": Fault(
        *(lm.LanguageModel, "_begin", "documents.positions_T + state.lengths_B[documents.index_T]"),
        "documents.positions_T",
        *(DECODE, "sublayers.0 (attention, model.layers.0): queries "),
        shape="llama",
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "positions left out": Fault(
        *(mixers.Attention, "forward", "if config.rope_theta is not None:", "if False:"),
        *(TRUTH, "sublayers.0 (attention, model.layers.0): queries |(as if positions were left out)"),
        shape="llama",
        quiet=(PACKED, DECODE),
    ),
    "the future is seen": Fault(
        *(attention, "attention_packed", "is_causal=True", "is_causal=False"),
        *("causality", "sublayers.2 (attention, model.layers.1): attention |token 0"),
    ),
    "an unused parameter": Fault(
        *(mixers.Attention, "forward", "if config.qk_norm:", "if False:"),
        *(TRAINED, "sublayers.2.mixer.q_norm_weight is not used"),
        shape="turbos",
    ),
    "a parameter without gradient": Fault(
        *(mixers.Mamba2, "forward", "self.D.to(x_THP.dtype)", "self.D.detach().to(x_THP.dtype)"),
        *(TRAINED, "sublayers.0.mixer.D is not used"),
        quiet=(TRUTH, WHOLE, PACKED, DECODE),
    ),
    "a residual multiplier forgotten": Fault(
        *(lm.Sublayer, "forward", "if self.multiplier == 1.0 else", "if True else"),
        *(TRUTH, "sublayers.0 (Mamba2, model.layers.0): residual "),
    ),
    "chunks that forget": Fault(
        *(ssd, "_states_before", "total_CH[source, :, None, None], before[source]"),
        "total_CH[source, :, None, None], torch.zeros_like(before[source])",
        *("chunk size unseen", "sublayers.0 (Mamba2, model.layers.0): scan "),
    ),
    "Mamba-1: dropped D": Fault(
        *(mixers.Mamba1, "forward", "torch.addcmul(y_TI, x_TI, self.D.to(x_TI.dtype))", "y_TI"),
        *(TRUTH, "sublayers.0 (Mamba-1): gated |(as if D were left out)"),
        shape="mamba1",
        quiet=(PACKED, DECODE, SEGMENTS),
    ),
    "Mamba-1: a missing gate": Fault(
        *(mixers.Mamba1, "forward", "y_TI * F.silu(z_TI)", "y_TI"),
        *(TRUTH, "sublayers.0 (Mamba-1): gated |(as if the gate were left out)"),
        shape="mamba1",
        quiet=(PACKED, DECODE),
    ),
    "Mamba-1: x and gate swapped": Fault(
        *(mixers.Mamba1, "forward", "x_TI, z_TI = self", "z_TI, x_TI = self"),
        *(TRUTH, "sublayers.0 (Mamba-1): conv "),
        shape="mamba1",
        quiet=(PACKED, DECODE),
    ),
    "Mamba-1: B and C swapped in the scan": Fault(
        *(selective_scan._SelectiveScan, "forward", "A_NI, B_TN, C_TN, initial_DNI, A_NI * LOG2_E"),
        "A_NI, C_TN, (C_TN := B_TN), initial_DNI, A_NI * LOG2_E",
        *(TRUTH, "sublayers.0 (Mamba-1): scan |(as if B and C were swapped)"),
        shape="mamba1",
    ),
    "Mamba-1: decays of another base": Fault(
        *(
            mixers.Mamba1,
            "_scan",
            "torch.exp(self.A_log.to(dt_TI.dtype).T)",
            "torch.exp2(self.A_log.to(dt_TI.dtype).T)",
        ),
        *(TRUTH, "sublayers.0 (Mamba-1): scan "),
        shape="mamba1",
        quiet=(PACKED, DECODE, SEGMENTS),
    ),
    "Mamba-1: nothing decays": Fault(
        *(mixers.Mamba1, "_scan", "-torch.exp(self.A_log.to(dt_TI.dtype).T)", "torch.zeros_like(self.A_log.T)"),
        *(TRUTH, "sublayers.0 (Mamba-1): scan |(as if nothing decayed)"),
        shape="mamba1",
        quiet=(PACKED, DECODE),
    ),
    "Mamba-1: the states of a channel decay alike": Fault(
        *(mixers.Mamba1, "_scan", "-torch.exp(self.A_log.to(dt_TI.dtype).T)"),
        "(-torch.exp(self.A_log.to(dt_TI.dtype).T)).amax(0).expand_as(self.A_log.T)",
        *(TRUTH, "sublayers.0 (Mamba-1): scan |(as if all states of a channel decayed alike)"),
        shape="mamba1",
    ),
    "Mamba-1: no bias of dt": Fault(
        *(
            mixers.Mamba1,
            "forward",
            "self.dt_proj(dt_TR).to(wide) + self.dt_bias.to(wide)",
            "self.dt_proj(dt_TR).to(wide)",
        ),
        *(TRUTH, "sublayers.0 (Mamba-1): dt |(as if the bias were left out)"),
        shape="mamba1",
        quiet=(PACKED, DECODE),
    ),
    "Mamba-1: scan leaks between documents": Fault(
        *(selective_scan, "_chunks", "None if first == start else kept - 1", "kept - 1 if kept else None"),
        *(PACKED, "sublayers.0 (Mamba-1): scan |first in document 1, token 0"),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, "causality"),
    ),
    "Mamba-1: conv leaks between documents": Fault(
        *(mixers.Mamba1, "_convolve", "self.conv_bias, call.documents)[0]"),
        "self.conv_bias, type(call.documents).from_lengths([call.documents.total]))[0]",
        *(PACKED, "sublayers.0 (Mamba-1): conv |first in document 1, token 0"),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, "causality"),
    ),
    "Mamba-1: scan state dropped between segments": Fault(
        *(mixers.Mamba1, "_scan", "call.documents, state.ssm_BNI, size", "call.documents, None, size"),
        *(SEGMENTS, "sublayers.0 (Mamba-1): scan |document 0, token 1"),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "Mamba-1: scan state not carried": Fault(
        *(mixers.Mamba1, "_scan", "state.ssm_BNI.copy_(rows)", "pass"),
        *(DECODE, "sublayers.0 (Mamba-1): scan "),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "Mamba-1: the step forgets dt": Fault(
        *(mixers, "selective_scan_step", "(dt_BI * x_BI)", "x_BI"),
        *(DECODE, "sublayers.0 (Mamba-1): scan "),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, PACKED),
    ),
    "Mamba-1: chunks that forget": Fault(
        *(selective_scan._Inputs, "before", "return kept_SNI[chunk.before]", "return None"),
        *("chunk size unseen", "sublayers.0 (Mamba-1): scan "),
        shape="mamba1",
    ),
    "Mamba-1: a gradient that leaks between documents": Fault(
        *(selective_scan._SelectiveScan, "backward", "dfinal_DNI[chunk.document] if chunk.after is None else after_NI"),
        "dfinal_DNI[chunk.document] + after_NI if chunk.after is None else after_NI",
        *(GRADIENTS, "sublayers."),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, PACKED, DECODE, TRAINED),
    ),
    "Mamba-1: a parameter without gradient": Fault(
        *(mixers.Mamba1, "_scan", "self.A_log.to(dt_TI.dtype)", "self.A_log.detach().to(dt_TI.dtype)"),
        *(TRAINED, "sublayers.0.mixer.A_log is not used"),
        shape="mamba1",
        quiet=(TRUTH, WHOLE, PACKED, DECODE),
    ),
    "a capacity outside training": Fault(
        *(mixers.Experts, "forward", "call.recycling is not None:"),
        "(call := __import__('dataclasses').replace(call, recycling=torch.Generator())):",
        *(TRUTH, "sublayers.1 (mixture of experts): routed experts "),
        shape="mamba1",
    ),
    "a batch's scan states in another order": Fault(
        *(
            mixers.Mamba2,
            "_scan",
            "call.documents, state.ssm_BHPN, self",
            "call.documents, state.ssm_BHPN.flip(0), self",
        ),
        *(SEGMENTS, "sublayers.0 (Mamba2, model.layers.0): scan |first in document 1, token 2"),
        quiet=(TRUTH, WHOLE, PACKED, BATCH, DECODE),
    ),
    "a batch's conv states in another order": Fault(
        *(mixers.Mamba2, "_convolve", "documents, state.conv_BKC)", "documents, state.conv_BKC.flip(0))"),
        *(SEGMENTS, "sublayers.0 (Mamba2, model.layers.0): conv |first in document 1, token 2"),
        quiet=(TRUTH, WHOLE, PACKED, BATCH, DECODE),
    ),
    "taps with twice their gradient": Fault(
        *(conv._CausalConv, "backward", "dtaps_KC.T", "2 * dtaps_KC.T"),
        *(TRUE_GRADIENTS, "sublayers.4.mixer.conv_weight differs by 1.0e+00"),
        quiet=(TRUTH, WHOLE, PACKED, DECODE, GRADIENTS, TRAINED),
    ),
    "gates that no loss trains": Fault(
        *(mixers.Experts, "forward", "self._route(logits_TE)", "self._route(logits_TE.detach())"),
        *(TRUE_GRADIENTS, "sublayers.5.mixer.router_weight differs by 1.0e+00"),
        quiet=(TRUTH, WHOLE, PACKED, DECODE, GRADIENTS, TRAINED),
    ),
    "half of the head's gradient": Fault(
        *(loss._CrossEntropy, "backward", "(dweight_VD * dtotal)", "(dweight_VD * dtotal / 2)"),
        *(TRUE_GRADIENTS, "embed_weight differs by "),
        quiet=(TRUTH, WHOLE, PACKED, DECODE, GRADIENTS, TRAINED),
    ),
    "a gradient that leaks between documents": Fault(
        *(conv._CausalConv, "backward", "return dpadded.index_select(0, margins.token_rows_T)"),
        "return dpadded.index_add(0, (margins.margin_rows - margins.margin_rows[0] - 1).clamp(min=0), "
        "dpadded[margins.margin_rows]).index_select(0, margins.token_rows_T)",
        *(GRADIENTS, "sublayers."),
        quiet=(TRUTH, WHOLE, PACKED, DECODE, TRAINED),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    directory = saved(tmp_path / "model", fault.shape)
    plant(monkeypatch, fault.owner, fault.function, fault.old, fault.new)
    # They have faults of their own, in `test_verify_engine`.
    monkeypatch.setattr("turbos.verify.certificate.engine_rows", lambda subject, ours: ([], []))
    report = certificate(directory)
    check = check_named(report, fault.check)
    assert not report.ok and not check.ok, failed(report)
    for words in fault.where.split("|"):
        assert words in check.where, check.where
    assert not set(fault.quiet) & set(failed(report)), failed(report)
    assert not check.error <= check.tolerance


def test_an_expert_transposed_on_export_is_found_by_the_native_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    directory = saved(tmp_path / "model", "granite")

    def save_transposed(model: lm.LanguageModel, target: Path, **options: Any) -> None:
        wrong = tiny_model(**SHAPES["granite"])
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            wrong.sublayers[3].mixer.w_in[0] = wrong.sublayers[3].mixer.w_in[0].T.clone()
        checkpoint.save_model(wrong, target, **options)

    monkeypatch.setattr(native, "save_model", save_transposed)
    report = certificate(directory)
    assert set(failed(report)) == {"export == native (transformers)"}
    where = check_named(report, "export == native (transformers)").where
    assert "sublayers.3 (mixture of experts, model.layers.1): residual" in where


def test_weights_changed_on_the_way_back_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(tmp_path / "model", "granite")
    plain = checkpoint.load_model

    def load_rounded(source: Path, *rest: Any) -> lm.LanguageModel:
        model = plain(source, *rest)
        if source != directory:
            with torch.no_grad():
                model.sublayers[1].mixer.w_out.copy_(model.sublayers[1].mixer.w_out.bfloat16())
        return model

    monkeypatch.setattr("turbos.verify.implementation.load_model", load_rounded)
    check = check_named(certificate(directory), "save -> load == original")
    assert not check.ok and check.where.startswith("sublayers.1.mixer.w_out differs by")
