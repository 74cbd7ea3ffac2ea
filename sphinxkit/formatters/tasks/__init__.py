"""Vision-language tasks: wording of questions and answers, and parsing of answers."""

from sphinxkit.formatters.tasks.base import (
    ERROR_KINDS,
    Example,
    GroundedPhrase,
    Keypoints,
    ParseError,
    ParseResult,
    Task,
    create,
    names,
    register,
    registry,
)
from sphinxkit.formatters.tasks.box_formats import BOX_FORMATS, BoxFormat, read_boxes_of
from sphinxkit.formatters.tasks.caption import Caption, CaptionSample, DetailedCaption
from sphinxkit.formatters.tasks.chart import Chart, ChartSample
from sphinxkit.formatters.tasks.classification import Classification, ClassificationSample
from sphinxkit.formatters.tasks.detection import Detection, DetectionSample, TextDetection, TextDetectionSample
from sphinxkit.formatters.tasks.grounded_caption import GroundedCaption, GroundedCaptionSample
from sphinxkit.formatters.tasks.layout import DOCLAYNET_CLASSES, PUBLAYNET_CLASSES, Layout, LayoutSample
from sphinxkit.formatters.tasks.multiple_choice import MultipleChoice, MultipleChoiceSample
from sphinxkit.formatters.tasks.pose import COCO_KEYPOINTS, Pose, PoseSample
from sphinxkit.formatters.tasks.question import VQA, QuestionSample, VizWiz
from sphinxkit.formatters.tasks.questions import TaskQuestion, make_question, question_fields, text_fields
from sphinxkit.formatters.tasks.region import REC, REG, RegionSample
from sphinxkit.formatters.tasks.relation import Relation, RelationSample

__all__ = [
    "BOX_FORMATS",
    "COCO_KEYPOINTS",
    "DOCLAYNET_CLASSES",
    "ERROR_KINDS",
    "PUBLAYNET_CLASSES",
    "REC",
    "REG",
    "VQA",
    "BoxFormat",
    "Caption",
    "CaptionSample",
    "Chart",
    "ChartSample",
    "Classification",
    "ClassificationSample",
    "DetailedCaption",
    "Detection",
    "DetectionSample",
    "Example",
    "GroundedCaption",
    "GroundedCaptionSample",
    "GroundedPhrase",
    "Keypoints",
    "Layout",
    "LayoutSample",
    "MultipleChoice",
    "MultipleChoiceSample",
    "ParseError",
    "ParseResult",
    "Pose",
    "PoseSample",
    "QuestionSample",
    "RegionSample",
    "Relation",
    "RelationSample",
    "Task",
    "TaskQuestion",
    "TextDetection",
    "TextDetectionSample",
    "VizWiz",
    "create",
    "make_question",
    "names",
    "question_fields",
    "read_boxes_of",
    "register",
    "registry",
    "text_fields",
]
