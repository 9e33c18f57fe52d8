"""The paper's tables and figures (arXiv 2606.06021v4) with its numbers, as questions."""

from __future__ import annotations

from oprd.paper import measures as m
from oprd.paper.further import FURTHER
from oprd.paper.question import (
    MAIN,
    NOT_KNOWN,
    REFUSED,
    TOO_SMALL,
    PaperNumbers,
    Question,
    Section,
    above,
    within,
)

TABLE_2 = {
    "student": (32.9, 21.9, 62.2),
    "opd_top1": (42.3, 33.5, 77.0),
    "opd_top4": (47.1, 34.0, 76.5),
    "oprd": (49.8, 34.6, 79.1),
    "teacher": (50.8, 35.6, 79.5),
}
"""Avg@16 in % on AIME24, AIME25 and AIMO; the paper's OPD top-16 stands beside our top-4."""

TABLES = (
    Section(
        "table-2", "Table 2", "Accuracy of OPD and OPRD",
        "The paper's OPD top-16 of 151 k tokens stands beside our top-4 of 28. Its sets are "
        "AIME24, AIME25 and AIMO; ours are held-out additions of rising difficulty.",
        (
            Question(
                "equal-steps", "Is OPRD better than OPD after as many steps?",
                "OPRD 54.5, OPD top-16 52.5, OPD top-1 50.9 % (mean of three sets)",
                (above("oprd", "opd_top1", m.ACCURACY), above("oprd", "opd_top4", m.ACCURACY)),
            ),
        ),
        (m.STUDENT, *MAIN, "teacher"), (m.ACCURACY, m.BEST),
        PaperNumbers(
            ("AIME24, %", "AIME25, %", "AIMO, %", "mean, %"),
            {row: (*v, round(sum(v) / len(v), 1)) for row, v in TABLE_2.items()},
        ),
        by_set=True,
    ),
    Section(
        "table-3", "Table 3", "Time and memory of a step",
        "Training seconds of our runs, which shared the machine with each other. Both kinds of "
        "loss run through the same code here, without the extra passes of the paper's OPD.",
        (
            Question(
                "step-time", "Is a step of OPRD cheaper than one of OPD?",
                "500 steps: OPRD 563, OPD top-1 813, OPD top-16 812 min",
                (above("opd_top1", "oprd", m.STEP), above("opd_top4", "oprd", m.STEP)),
            ),
            Question(
                "memory", "Does OPRD need less memory than OPD?",
                "Peak of the update above its start: OPRD 20.5, OPD top-1 30.2, OPD top-16 45.0 GB",
                unasked=(
                    TOO_SMALL,
                    "the head has {vocabulary} tokens here, so that logits take next to no memory; "
                    "oprd-gains measures this with heads of real size",
                ),
            ),
        ),
        (*MAIN, "mu_10"),
        (m.phase("rollout"), m.phase("teacher"), m.phase("student update"), m.STEP,
         m.TOKENS_PER_SECOND),
        PaperNumbers(
            ("memory, GB", "500 steps, min"),
            {"opd_top1": (30.2, 813), "opd_top4": (45.0, 812), "oprd": (20.5, 563)},
        ),
    ),
    Section(
        "table-4", "Table 4", "OPRD-Bridge: a teacher of another width and depth",
        "The paper: Qwen3-4B to Qwen3-1.7B-Base, r = 8. Here the teacher is wider and deeper than "
        "the student and was trained apart from it.",
        (
            Question(
                "bridge-teaches", "Does the Bridge teach across widths?",
                "Avg@16: 2.8 before, 11.2 % after",
                (above("bridge_r8", m.STUDENT, m.ACCURACY),),
            ),
            Question(
                "bridge-and-opd", "Is the Bridge between OPD top-1 and OPD top-k?",
                "OPD top-1 15.3, Bridge 11.2, OPD top-16 10.4 %",
                (above("shape_top1", "bridge_r8", m.ACCURACY),
                 above("bridge_r8", "shape_top4", m.ACCURACY)),
            ),
            Question(
                "bridge-then", "Does OPD top-1 after the Bridge add to it?",
                "Avg@16 13.6 against 11.2 %",
                (above("bridge_then_top1", "bridge_r8", m.ACCURACY),),
            ),
            Question(
                "bridge-diversity", "Are the responses more diverse after the Bridge than after "
                "OPD top-1?", "Dist-4g 20.4 against 9.4 %",
                (above("bridge_r8", "shape_top1", m.DISTINCT),),
            ),
            Question(
                "bridge-length", "Are they shorter?", "5,333 against 16,020 tokens",
                (above("shape_top1", "bridge_r8", m.LENGTH),),
            ),
        ),
        (m.STUDENT, "shape_top1", "shape_top4", "bridge_r8", "bridge_then_top1",
         "teacher_of_other_shape"),
        (m.ACCURACY, m.BEST, m.DISTINCT, m.LENGTH),
        PaperNumbers(
            ("Avg@16, %", "Best@16, %", "Dist-4g", "length, tokens"),
            {
                "student": (2.8, None, None, None),
                "shape_top1": (15.3, 30.8, 9.4, 16020),
                "shape_top4": (10.4, 27.1, 11.7, 11410),
                "bridge_r8": (11.2, 30.8, 20.4, 5333),
                "bridge_then_top1": (13.6, 33.9, 15.0, 7169),
            },
        ),
    ),
    Section(
        "table-5", "Table 5", "Layers, loss and positions of OPRD",
        "The paper's numbers of this table are not at hand, so that ours stand alone: there "
        "is no order to agree with. k is 16 tokens here.",
        (
            Question(
                "layers", "Do all layers teach more than some of them?", NOT_KNOWN,
                tuple(
                    above("oprd", row, m.ACCURACY) for row in ("oprd_last", "oprd_even", "oprd_odd")
                ),
                has_order=False,
            ),
            Question(
                "loss", "Does the raw squared error teach more than a normalised loss?", NOT_KNOWN,
                tuple(above("oprd", row, m.ACCURACY) for row in ("oprd_nmse", "oprd_cosine")),
                has_order=False,
            ),
            Question(
                "positions", "Do all positions teach more than some of them?", NOT_KNOWN,
                tuple(above("oprd", row, m.ACCURACY) for row in ("oprd_first_k", "oprd_last_k")),
                has_order=False,
            ),
        ),
        ("oprd", "oprd_last", "oprd_even", "oprd_odd", "oprd_nmse", "oprd_cosine", "oprd_first_k",
         "oprd_last_k"),
        (m.ACCURACY, m.BEST, m.COSINE, m.KL, m.STEP),
    ),
    Section(
        "table-6", "Table 6", "A teacher with another tokenizer",
        "The paper: Phi-4-mini to Qwen3-1.7B-Base, r = 4. Here positions are paired where tokens "
        "of both end at the same byte. The paper's public code feeds the student's ids to the "
        "teacher; that is the row with the student's ids.",
        (
            Question(
                "tokenizer-teaches", "Does the Bridge teach across tokenizers?",
                "Avg@16 from 2.8 to 5.0, Best@16 from 4.5 to 21.3 %",
                (above("tok_bridge", m.STUDENT, m.ACCURACY),
                 above("tok_bridge", m.STUDENT, m.BEST)),
            ),
            Question(
                "tokenizer-opd", "Does OPD collapse across tokenizers?", "It collapses",
                unasked=(
                    REFUSED,
                    "OPD compares probabilities of the same tokens; oprd refuses it where the "
                    "vocabularies differ",
                ),
            ),
            Question(
                "student-ids", "Is reading the response with the teacher's own tokenizer better "
                "than feeding it the student's ids?", "The public code feeds the student's ids",
                (above("tok_bridge", "tok_student_ids", m.ACCURACY),), has_order=False,
            ),
        ),
        (m.STUDENT, "tok_bridge", "tok_student_ids", "teacher_of_other_tokenizer"),
        (m.ACCURACY, m.BEST, m.BRIDGED_COSINE),
        PaperNumbers(
            ("Avg@16, %", "Best@16, %"), {"student": (2.8, 4.5), "tok_bridge": (5.0, 21.3)}
        ),
    ),
)  # fmt: skip

FIGURES = (
    Section(
        "figure-1", "Figure 1", "Accuracy, time and memory",
        "At equal seconds, each run's validation curve is interpolated at the smallest of the "
        "compared runs' total training seconds. The paper's bubbles show memory by their area; "
        "ours are all of one size (see Table 3).",
        (
            Question(
                "equal-seconds", "Is OPRD better than OPD after as many seconds?",
                "AIME24: OPRD 49.8 % in 563 min; OPD top-1 42.3 % in 813, top-16 47.1 % in 812 min",
                (above("oprd", "opd_top1", m.EQUAL_SECONDS),
                 above("oprd", "opd_top4", m.EQUAL_SECONDS)),
            ),
        ),
        MAIN, (m.ACCURACY, m.SECONDS, m.EQUAL_SECONDS),
        PaperNumbers(
            ("AIME24, %", "500 steps, min"),
            {"opd_top1": (42.3, 813), "opd_top4": (47.1, 812), "oprd": (49.8, 563)},
        ),
    ),
    Section(
        "figure-4", "Figure 4", "Accuracy along the training",
        "Accuracy on the validation set. The paper's curves are not at hand; the order is "
        "that of their ends, Table 2.",
        (
            Question(
                "along", "Is OPRD above OPD along the training (mean of the curve over steps)?",
                "At the end: OPRD above both (Table 2)",
                (above("oprd", "opd_top1", m.CURVE), above("oprd", "opd_top4", m.CURVE)),
            ),
        ),
        MAIN, (m.CURVE, m.END_OF_CURVE),
    ),
    Section(
        "figure-5", "Figure 5", "Response length",
        "The end is the last quarter of the steps. Here the task bounds the length: a correct "
        "response has 30 to 123 tokens.",
        (
            Question(
                "shorter", "Are responses shorter with OPRD than with OPD?",
                "About 5,700 (OPRD) against 7,000 tokens (OPD)",
                (above("opd_top1", "oprd", m.ROLLOUT_LENGTH),),
            ),
        ),
        (m.STUDENT, *MAIN, "teacher"), (m.ROLLOUT_LENGTH, m.LENGTH),
        PaperNumbers(("tokens, about",), {"opd_top1": (7000,), "oprd": (5700,)}),
    ),
    Section(
        "figure-6", "Figure 6", "Cosine of the hidden states",
        "Measured after the training on held-out rollouts of each run's student. The curves are of "
        "the rows that log it while they train.",
        (
            Question(
                "closer", "Are the states closer to the teacher's after OPRD than after OPD?",
                NOT_KNOWN, (above("oprd", "opd_top1", m.COSINE),), has_order=False,
            ),
        ),
        (m.STUDENT, *MAIN, "mu_1", "mu_10"), (m.COSINE, m.LAST_COSINE),
    ),
    Section(
        "figure-7", "Figure 7", "Weight of OPRD beside OPD",
        "OPD top-1 + mu OPRD; mu = 0 is OPD top-1.",
        (
            Question(
                "mu", "Does more OPRD beside OPD help?",
                "AIME24: 42.3 (mu = 0), 47.7 (1), 50.2 % (10)",
                (above("mu_10", "opd_top1", m.ACCURACY), above("mu_1", "opd_top1", m.ACCURACY),
                 above("mu_10", "mu_1", m.ACCURACY)),
            ),
        ),
        ("opd_top1", "mu_1", "mu_10", "oprd"), (m.ACCURACY, m.KL, m.COSINE),
        PaperNumbers(("AIME24, %",), {"opd_top1": (42.3,), "mu_1": (47.7,), "mu_10": (50.2,)}),
    ),
    Section(
        "figure-8", "Figure 8", "Cosine of the first and the last tokens",
        "In the last layer. The paper compares its first 1,600 tokens, about a quarter of a "
        "response, with the last 50. Here both are 16 tokens, about a third.",
        (
            Question(
                "first-closer", "Are the first tokens of a response closer than the last?",
                "First 1,600: at least 97 %; last 50: 91.65 %; all: 95.42 %",
                (within("oprd", m.COSINE_GAP, "OPRD-Vanilla, first 16 minus last 16"),),
            ),
        ),
        ("oprd", "opd_top1"), (m.COSINE_FIRST, m.COSINE_LAST, m.LAST_COSINE),
        PaperNumbers(
            ("first 1,600, %", "last 50, %", "all, %"), {"oprd": ("at least 97", 91.65, 95.42)}
        ),
    ),
    Section(
        "figure-9", "Figure 9", "Policy-gradient loss",
        "The loss is the mean of log p - log q of the sampled tokens, an estimate of the KL to the "
        "teacher that the table gives, measured on held-out rollouts. Rows without an output-space "
        "objective do not log it.",
        (
            Question(
                "kl", "Does OPRD, which never sees the teacher's outputs, lower their KL?",
                NOT_KNOWN, (above(m.STUDENT, "oprd", m.KL),), has_order=False,
            ),
            Question(
                "kl-opd", "Is the KL higher after OPRD than after OPD top-1?", NOT_KNOWN,
                (above("oprd", "opd_top1", m.KL),), has_order=False,
            ),
        ),
        (m.STUDENT, *MAIN, "mu_1", "mu_10"), (m.KL,),
    ),
    Section(
        "figure-10", "Figure 10", "Overlap of the likeliest tokens",
        "Shared tokens of both models' 4 likeliest (the paper's 16 of 151 k).",
        (
            Question(
                "overlap", "Is the overlap higher after OPRD than after OPD top-1?", NOT_KNOWN,
                (above("oprd", "opd_top1", m.OVERLAP),), has_order=False,
            ),
        ),
        (m.STUDENT, *MAIN, "mu_1", "mu_10"), (m.OVERLAP,),
    ),
    Section(
        "figure-11", "Figure 11", "Entropy of student and teacher",
        "Both on the student's rollouts.",
        (
            Question(
                "entropy", "Is the student's entropy higher after OPRD than after OPD top-1?",
                NOT_KNOWN, (above("oprd", "opd_top1", m.ENTROPY),), has_order=False,
            ),
        ),
        (m.STUDENT, *MAIN, "mu_1", "mu_10"), (m.ENTROPY, m.TEACHER_ENTROPY),
    ),
    Section(
        "figure-12", "Figure 12", "Rank of the Bridge",
        "Cosine of the projected states over the last quarter of the steps. Of the paper's ranks "
        "1 to 2,048 at a width of 2,048, ours are 1, 8 and 32 at 128.",
        (
            Question(
                "rank", "Is a rank of 8 better than one of 1 and one of 32, by the cosine?",
                "72.3 (r = 1), 95.0 (8), 94.1 (32), 87.9 (256), 77.0 % (2,048)",
                (above("bridge_r8", "bridge_r1", m.BRIDGED_COSINE),
                 above("bridge_r8", "bridge_r32", m.BRIDGED_COSINE)),
            ),
        ),
        ("bridge_r1", "bridge_r8", "bridge_r32"), (m.BRIDGED_COSINE, m.ACCURACY),
        PaperNumbers(
            ("cosine, %",), {"bridge_r1": (72.3,), "bridge_r8": (95.0,), "bridge_r32": (94.1,)}
        ),
    ),
)  # fmt: skip
SECTIONS = (*TABLES, *FIGURES, *FURTHER)
