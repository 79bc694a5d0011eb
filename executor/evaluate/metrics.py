"""Every metric by its name in a recipe. What each does: docs/metrics.md."""

from executor.evaluate.scoring import anls, boxes, choice, exact, mmmu, ocrbench, relaxed, vqa
from executor.evaluate.scoring.score import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("vqa_accuracy", ("references",), vqa.score, "facebookresearch/mmf, TextVQAAccuracyEvaluator"),
        Metric("anls", ("references",), anls.score, "QwenLM/Qwen-VL, eval_mm/infographicsvqa_eval.py; lmms-eval, anls"),
        Metric("relaxed_accuracy", ("references",), relaxed.score, "QwenLM/Qwen-VL, eval_mm/evaluate_vqa.py"),
        Metric("mmmu_accuracy", ("references",), mmmu.score, "MMMU-Benchmark/MMMU, eval/eval_utils.py"),
        Metric("ocrbench_accuracy", ("references",), ocrbench.score, "Yuliang-Liu/MultimodalOCR, OCRBench/example.py"),
        Metric("box_iou", ("boxes",), boxes.score, "QwenLM/Qwen-VL, eval_mm/evaluate_grounding.py"),
        Metric("choice_accuracy", ("references",), choice.score, "lmms-eval, mcq_extract.py"),
        Metric("exact_match", ("references", "boxes"), exact.score, "plain equality"),
    )
}
