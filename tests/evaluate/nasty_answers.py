"""Nasty answers, each with the only right verdict: what must not pass, and what must not fail.

A row is what a model wrote, what was asked, and three verdicts: the strict outcome, the answer that was read (``None``
exactly where it is unparsed or unfinished), and the lenient outcome, which shows where a guessing extractor differs,
rightly or wrongly. Rows with the comment "lenient errs" are wrong guesses on purpose: nobody may mend strict
grading to agree with them.
"""

from __future__ import annotations

from nasty_rows import DRUGS, C, F, U, W, letters, numbers, texts, words

from medcot.records import Allowance

EXPLICIT = letters(
    # --- one letter on the last line, as asked for
    ("B", "Final answer: B", C, "B", C),
    ("B", "final ANSWER: b", C, "B", C),
    ("B", "FINAL ANSWER: B", C, "B", C),
    ("B", "Final answer: B.", C, "B", C),
    ("B", "Final answer: (B)", C, "B", C),
    ("B", "Final answer: (B).", C, "B", C),
    ("B", "Final answer: B)", C, "B", C),
    ("B", "Final answer : B", C, "B", C),
    ("B", "Final\tanswer:\tB", C, "B", C),
    ("B", "**Final answer: B**", C, "B", C),
    ("B", "**Final answer:** B", C, "B", C),
    ("B", "**Final answer**: **B**", C, "B", C),
    ("B", "Final answer: **B", C, "B", C),  # bold that was never closed
    ("B", "  Final answer:B  \n\n \n", C, "B", C),
    ("B", "Final answer: B\r\n", C, "B", C),
    ("B", "Final answer: B \t ", C, "B", C),
    # --- what no reader sees
    ("B", "Final answer: B\u200b", C, "B", C),  # zero-width space
    ("B", "\ufeffFinal answer: B", C, "B", C),  # byte order mark
    ("B", "Final answer: \u200eB", C, "B", C),  # left-to-right mark
    ("B", "\u200fFinal answer: B\u200f", C, "B", C),  # right-to-left marks
    ("B", "Final\u00a0answer:\u00a0B", C, "B", C),  # no-break spaces
    ("B", "Final answer: \u2066B\u2069", C, "B", C),  # isolates
    ("B", "Final ans\u00adwer: B", C, "B", C),  # soft hyphen
    # --- prose above it changes nothing, whatever it names
    ("B", "A is wrong because of the murmur. C is a trap.\nFinal answer: B", C, "B", C),
    ("B", "The answer is A.\nFinal answer: B", C, "B", C),
    ("B", "\\boxed{A}\nFinal answer: B", C, "B", C),
    ("B", "Some say final answer: A.\r\nFinal answer: B\r\n", C, "B", C),
    ("B", "| option | verdict |\n|---|---|\n| A | no |\n| B | yes |\n\nFinal answer: B", C, "B", C),
    ("B", "Not B? No: not A.\nFinal answer: B", C, "B", C),
    ("A", "A patient like this needs B or C or D.\nFinal answer: A", C, "A", C),
    ("B", "🩺 Diabetes, type 2 💊\nFinal answer: B", C, "B", C),
    ("B", "最终答案是 A。\nFinal answer: B", C, "B", C),
    ("B", "- A: no\n- B: yes\n\n---\nFinal answer: B", C, "B", C),
    ("B", "Final answer: B\nLet me check that again.\nFinal answer: B.", C, "B", C),
    ("B", "Final answer: B\n**Final answer: b**", C, "B", C),
    ("B", "Final answer below.\nFinal answer: B", C, "B", C),
    # --- the letter and exactly its text
    ("B", "Final answer: B. Metformin", C, "B", C),
    ("B", "Final answer: B) metformin.", C, "B", C),
    ("B", "Final answer: (B) Metformin", C, "B", C),
    ("B", "Final answer: B: Metformin", C, "B", C),
    ("C", "Final answer: c. insulin  glargine", C, "C", C),
    ("D", "**Final answer: D) Vitamin B**", C, "D", C),
    # --- readable, and wrong: a wrong letter is wrong whatever else is said
    ("B", "Final answer: A", W, "A", W),
    ("B", "The answer is clearly B.\nFinal answer: C", W, "C", W),
    ("B", "\\boxed{B}\nFinal answer: C", W, "C", W),
    ("B", "Final answer: A. Lisinopril", W, "A", W),
    ("B", "Final answer: D. Vitamin B", W, "D", W),
    ("A", "Final answer: B", W, "B", W),
    ("B", "Final answer: E", W, "E", W),  # no option has this letter
    ("B", "Final answer: X", W, "X", W),  # the prompt's own wording
    options=DRUGS,
)

UNREAD_LETTERS = letters(
    # --- no line as asked for, but a letter that a reader would find
    ("B", "B", U, None, C),
    ("B", "(B)", U, None, C),
    ("B", "The answer is B.", U, None, C),
    ("B", "The correct answer to this question is (B).", U, None, C),
    ("B", "Answer: B", U, None, C),
    ("B", "**Answer:** B", U, None, C),
    ("B", "Final answer B", U, None, C),
    ("B", "Final answer is: B", U, None, C),
    ("B", "The final answer: B", U, None, C),
    ("B", "So, final answer: B", U, None, C),
    ("B", "- Final answer: B", U, None, C),
    ("B", "1. Final answer: B", U, None, C),
    ("B", "• Final answer: B", U, None, C),
    ("B", "### Final answer: B", U, None, C),
    ("B", "### Final answer\n\nB", U, None, C),
    ("B", "> Final answer: B", U, None, C),
    ("B", "| Final answer | B |", U, None, C),
    ("B", "| Final answer: B |", U, None, C),
    ("B", "*Final answer: B*", U, None, C),
    ("B", "__Final answer: B__", U, None, C),
    ("B", "`Final answer: B`", U, None, C),
    ("B", "```\nFinal answer: B\n```", U, None, C),
    ("B", "Final answer: `B`", U, None, C),
    ("B", 'Final answer: "B"', U, None, C),
    ("B", "Final answer:\nB", U, None, C),
    ("B", "Final answer - B", U, None, C),
    ("B", "Final answer: B\nI hope this helps!", U, None, C),
    ("B", "Final answer: B\n\n---", U, None, C),
    ("B", "Final answer: B 😀", U, None, C),
    ("B", "✅ Final answer: B", U, None, C),
    ("B", "Final answer: B!", U, None, C),
    ("B", "Final answer: B?", U, None, C),
    ("B", "Final answer: [B]", U, None, C),
    ("B", "Final answer: <B>", U, None, C),
    ("B", "Final answer: Option B", U, None, C),
    ("B", "Final answer: the answer is B", U, None, C),
    ("B", "Final answer: B because of the kidneys", U, None, C),
    ("B", "Final answer: B - Metformin", U, None, C),
    ("B", "Final answer: Metformin (B)", U, None, C),
    # --- LaTeX
    ("B", "\\boxed{B}", U, None, C),
    ("B", "Final answer: \\boxed{B}", U, None, C),
    ("B", "Final answer: $B$", U, None, C),
    ("B", "$$\\boxed{\\text{B}}$$", U, None, C),
    ("B", "Final answer: \\(\\boxed{\\mathrm{B}}\\)", U, None, C),
    ("B", "\\[\\boxed{\\textbf{B. Metformin}}\\]", U, None, C),
    ("B", "\\text{Final answer: B}", U, None, C),
    # --- other languages and forms of the character
    ("B", "Final answer：B", U, None, C),  # full-width colon
    ("B", "Final answer: Ｂ", U, None, C),  # full-width letter
    ("B", "Final answer: В", U, None, C),  # Cyrillic Ve
    ("B", "Final answer: Β", U, None, C),  # Greek Beta
    ("B", "Final answer: 𝐁", U, None, C),  # mathematical bold
    ("B", "最终答案：B", U, None, C),
    ("B", "答案是B。", U, None, C),
    ("B", "답: B", U, None, C),
    ("B", "정답: B", U, None, C),
    ("B", "答え：B", U, None, C),
    ("B", "Antwort: B", U, None, C),
    ("B", "Die richtige Antwort lautet B.", U, None, C),
    ("B", "Respuesta final: B", U, None, C),
    ("B", "La réponse est B.", U, None, C),
    ("B", "Ответ: Б", U, None, U),  # the second letter of another alphabet is no B
    ("B", "Ответ: B", U, None, C),
    ("B", "Final answer: \u202eB", U, None, C),  # an override shows another order than is written
    # --- the option's text without its letter
    ("B", "Final answer: metformin", U, None, C),
    ("B", "The best drug is metformin.", U, None, C),
    ("D", "Final answer: vitamin B", U, None, C),
    ("B", "Final answer: vitamin B", U, None, W),
    ("B", "Final answer: not lisinopril", U, None, U),
    # --- letter and text that disagree; lenient errs with the letter when the text is meant, and the other way round
    ("B", "Final answer: B. Lisinopril", U, None, C),
    ("B", "Final answer: A. Metformin", U, None, W),
    ("B", "Final answer: B. Metformin 500 mg", U, None, C),
    ("B", "Final answer: B) Metformin, because it is first line", U, None, C),
    # --- several answers
    ("B", "Final answer: A\nFinal answer: B", U, None, C),
    ("B", "Final answer: B\nFinal answer: A", U, None, W),
    ("B", "Final answer: B\nNo, wait.\nFinal answer: A\nFinal answer: B", U, None, C),
    ("B", "Final answer: A Final answer: B", U, None, C),
    ("B", "Final answer: B or C", U, None, C),  # lenient errs: it takes the first
    ("B", "Final answer: A, B", U, None, W),
    ("B", "Final answer: A and B", U, None, W),
    ("B", "Final answer: B/C", U, None, C),  # lenient errs
    ("B", "Final answer: BB", U, None, U),
    ("B", "Final answer: ABCD", U, None, U),
    # --- negations
    ("B", "Final answer: not B", U, None, U),
    ("B", "The answer is not B, but C.", U, None, W),
    ("B", "The answer cannot be A. It is B", U, None, C),
    ("B", "It isn't A, C or D.", U, None, W),  # lenient errs, as it must
    ("B", "C is incorrect, and A is ruled out.", U, None, U),
    # --- options listed and rejected, no last line
    ("B", "A is wrong because of the cough. B fits. C is wrong too. D is a distractor.", U, None, C),
    ("B", "B fits best.\nA would cause a cough, as would C.", U, None, W),  # lenient errs
    (
        "B",
        "A. Lisinopril\nB. Metformin\nC. Insulin glargine\nD. Vitamin B",
        U,
        None,
        W,
    ),  # lenient errs: a list is no answer
    # --- the article A, the pronoun I, units and vitamins
    ("A", "A patient with pneumonia needs rest.", U, None, U),
    ("A", "Final answer: A patient with pneumonia", U, None, U),
    ("A", "The answer is a beta blocker.", U, None, U),
    ("A", "The answer is a.", U, None, C),
    ("A", "Hepatitis A is likely.", U, None, C),  # lenient errs
    ("B", "She needs vitamin B12 and type-B care.", U, None, U),
    ("B", "I am sure.", U, None, U),
    # --- nothing
    ("B", "", U, None, U),
    ("B", " \n\t\n", U, None, U),
    ("B", "Final answer:", U, None, U),
    ("B", "Final answer: <letter>", U, None, U),
    ("B", "Final answer: none", U, None, U),
    ("B", "Final answer: I cannot give medical advice.", U, None, U),
    ("B", "Final answer: 2", U, None, U),
    ("B", "Final answer: **", U, None, U),
    options=DRUGS,
)

NO_OPTIONS = letters(
    ("B", "Final answer: B", C, "B", C),
    ("B", "Final answer: E", W, "E", W),
    ("B", "Final answer: B) Appendicitis", U, None, C),
    ("B", "Final answer: B. B", U, None, C),
)

THINKING = [
    *letters(
        ("B", "<think>Final answer: A</think>Final answer: B", C, "B", C),
        ("B", "Hm.</think>\nFinal answer: B", C, "B", C),  # the prompt opened the thinking
        ("B", "<think>a<think>b</think>c</think>\nFinal answer: B", C, "B", C),
        ("B", "<think>x</think>Final answer: A</think>\nFinal answer: B", C, "B", C),  # only the last tag counts
        ("B", "<think></think>\n\nFinal answer: B", C, "B", C),
        ("B", "<think>B, surely</think>\nFinal answer: C", W, "C", W),
        ("B", "<think>Final answer: B</think>", U, None, C),  # answered within the thinking only
        ("B", "<think>The answer is B.</think>\n\n", U, None, C),
        ("B", "Final answer: B</think>I am not sure.", U, None, U),
        ("B", "<think>Final answer: B", F, None, C),
        ("B", "<think>So is it A or", F, None, W),  # lenient errs: it reads half a thought
        ("B", "<think>", F, None, F),
        ("B", "<think>x</think>Final answer: B\n<think>wait", F, None, C),  # thinking opened again, and never closed
        ("B", "<think>x</think><think>Final answer: B", F, None, C),
        options=DRUGS,
    ),
    # --- the length limit
    *letters(
        ("B", "<think>x</think>Final answer: B", U, None, C),
        ("B", "<think>x</think>Final answer: B\n", C, "B", C),
        ("B", "<think>x", F, None, F),
        options=DRUGS,
        cut=True,
    ),
    *numbers(
        ("12", "<think>x</think>Final answer: 12", U, None, C),  # lenient errs if it was on its way to 120
        ("12", "<think>x</think>Final answer: 12\n", C, "12", C),
        cut=True,
    ),
]

YESNO = words(
    ("yes", "Final answer: yes", C, "yes", C),
    ("yes", "Final answer: Yes.", C, "yes", C),
    ("no", "**Final answer: NO**", C, "no", C),
    ("maybe", "Final answer: maybe", C, "maybe", C),
    ("yes", "No evidence against it.\nFinal answer: yes", C, "yes", C),
    ("yes", "Final answer: no", W, "no", W),
    ("maybe", "Final answer: yes", W, "yes", W),
    ("yes", "Yes, clearly.\nFinal answer: maybe", W, "maybe", W),
    ("yes", "Yes", U, None, C),
    ("yes", "Yes, because it works.", U, None, C),
    ("yes", "The answer is yes.", U, None, C),
    ("yes", "Answer: **Yes**", U, None, C),
    ("yes", "\\boxed{yes}", U, None, C),
    ("yes", "Final answer: yes, because it works", U, None, C),
    ("yes", "Final answer: yes/no", U, None, C),  # lenient errs
    ("yes", "Final answer: yes or maybe", U, None, C),  # lenient errs
    ("no", "Final answer: not yes", U, None, U),
    ("yes", "Final answer: y", U, None, U),
    ("yes", "Final answer: true", U, None, U),
    ("yes", "Final answer: probably yes", U, None, U),
    ("no", "There is no evidence for it.", U, None, U),
    ("no", "No evidence supports it", U, None, U),
    ("no", "Final answer: no evidence of harm", U, None, C),  # lenient errs: a determiner
    ("yes", "Final answer: oui", U, None, U),
    ("yes", "Final answer: ja", U, None, U),
    ("yes", "答案：是", U, None, U),
    ("yes", "Final answer: A", U, None, U),  # the letter that PubMedQA's yes has elsewhere
    ("yes", "Final answer: yes\nFinal answer: no", U, None, W),
    ("yes", "Final answer: ｙｅｓ", U, None, C),
)

NUMBERS = [
    *numbers(
        # --- the same value and unit, written otherwise
        ("85 mL/h", "Final answer: 85 mL/h", C, "85 mL/h", C),
        ("85 mL/h", "Final answer: 85.0 ml/hr.", C, "85.0 ml/hr.", C),
        ("85 mL/h", "Final answer: 85mL / hour", C, "85mL / hour", C),
        ("85 mL/h", "Final answer: 85 mL per hour", C, "85 mL per hour", C),
        ("85 mL/h", "**Final answer: 85 mL/h**", C, "85 mL/h", C),
        ("85 mL/h", "Final answer: 85\u00a0mL/h", C, "85 mL/h", C),
        ("1200 mL", "Final answer: 1,200 mL", C, "1,200 mL", C),
        ("1,200,000 units", "Final answer: 1200000 units", C, "1200000 units", C),
        ("0.5 mg", "Final answer: .50 mg", C, ".50 mg", C),
        ("-5 mmol/L", "Final answer: −5 mmol/L", C, "−5 mmol/L", C),
        ("12", "Final answer: +12", C, "+12", C),
        ("40 µg", "Final answer: 40 mcg", C, "40 mcg", C),
        ("40 μg/kg/min", "Final answer: 40 micrograms/kg/minute", C, "40 micrograms/kg/minute", C),
        ("22.5 kg/m2", "Final answer: 22.5 kg/m²", C, "22.5 kg/m²", C),
        ("22.5 kg/m2", "Final answer: 22.50 kg/m^2", C, "22.50 kg/m^2", C),
        ("96 mmHg", "Final answer: 96 mm Hg", C, "96 mm Hg", C),
        ("2.5 %", "Final answer: 2.5%", C, "2.5%", C),
        ("2.5 %", "Final answer: 2.5 percent", C, "2.5 percent", C),
        ("3 points", "Final answer: 3 point", C, "3 point", C),
        ("14 weeks 3 days", "Final answer: 14 weeks 3 days", C, "14 weeks 3 days", C),
        ("0", "Final answer: -0.0", C, "-0.0", C),
        ("12000", "Final answer: 12e3", C, "12e3", C),
        ("120000", "Final answer: 1.2 × 10^5", C, "1.2 × 10^5", C),
        ("250 ×10^9/L", "Final answer: 0.25 x 10¹²/L", C, "0.25 x 10¹²/L", C),
        ("0.000052", "Final answer: 5.2e-5", C, "5.2e-5", C),
        # --- readable, and wrong; lenient does not judge the unit, and so errs where only the unit is wrong
        ("85 mL/h", "Final answer: 85", W, "85", C),
        ("85 mL/h", "Final answer: 85 mL", W, "85 mL", C),
        ("85 mL/h", "Final answer: 85 mL/min", W, "85 mL/min", C),
        ("85 mL/h", "Final answer: 85.1 mL/h", W, "85.1 mL/h", W),
        ("85 mL/h", "Final answer: 850 mL/h", W, "850 mL/h", W),
        ("85 mL/h", "Final answer: -85 mL/h", W, "-85 mL/h", W),
        ("85 mL/h", "Final answer: 85 mL/h or 90 mL/h", W, "85 mL/h or 90 mL/h", C),
        ("85 mL/h", "Final answer: 85 mL/h (rounded)", W, "85 mL/h (rounded)", C),
        ("12", "Final answer: 12 mmol/L", W, "12 mmol/L", C),
        ("12", "Final answer: 12e3", W, "12e3", C),
        ("1 g", "Final answer: 1000 mg", W, "1000 mg", W),
        ("4 mEq/L", "Final answer: 4 mmol/L", W, "4 mmol/L", C),
        ("14 weeks 3 days", "Final answer: 14 weeks 4 days", W, "14 weeks 4 days", W),
        ("0.3", "Final answer: 0.30000000000000001", W, "0.30000000000000001", W),  # equal as floats
        ("15 %", "Final answer: 0.15", W, "0.15", W),  # percent is no fraction
        ("0.15", "Final answer: 15%", W, "15%", W),
        ("0.15", "Final answer: 0.15 %", W, "0.15 %", C),
        # --- not readable as one
        ("85 mL/h", "Final answer: about 85 mL/h", U, None, C),
        ("85 mL/h", "Final answer: = 85 mL/h", U, None, C),
        ("85 mL/h", "Final answer: 80-90 mL/h", U, None, W),
        ("85 mL/h", "Final answer: 85–90 mL/h", U, None, C),  # lenient errs: a range
        ("85 mL/h", "Final answer: 85 ± 5 mL/h", U, None, C),
        ("85 mL/h", "Final answer: 40 + 45 mL/h", U, None, W),
        ("85 mL/h", "Final answer: 40 + 45 = 85 mL/h", U, None, C),
        ("85 mL/h", "Final answer: ~85 mL/h", U, None, C),
        ("85 mL/h", "Final answer: >85 mL/h", U, None, C),  # lenient errs
        ("85 mL/h", "Final answer: $85$ mL/h", U, None, C),
        ("85 mL/h", "Final answer: \\boxed{85\\ \\text{mL/h}}", U, None, C),
        ("85 mL/h", "Final answer: mL/h 85", U, None, C),
        ("85 mL/h", "Final answer: eighty-five mL/h", U, None, U),
        ("85 mL/h", "Final answer: mL/h", U, None, U),
        ("85 mL/h", "Final answer: 85 mL/h\nFinal answer: 85.0 mL/h", U, None, C),
        ("85 mL/h", "The rate is 4 × 10 + 45 = 85 mL/h.", U, None, C),
        ("85 mL/h", "Give 85 mL/h for 24 hours.", U, None, W),  # lenient errs: it takes the last number
        ("1.5 mg", "Final answer: 1,5 mg", U, None, C),  # a decimal comma
        ("0.5 mg", "Final answer: 0,500 mg", U, None, W),
        ("1200", "Final answer: 1 200", U, None, W),
        ("1200", "Final answer: 12,00", U, None, W),
        ("0.5", "Final answer: 1/2", U, None, W),
        ("0.5", "Final answer: \\frac{1}{2}", U, None, W),
        ("85", "Final answer: ٨٥", U, None, C),  # Arabic-Indic digits
        ("85", "Final answer: ８５", U, None, C),  # full-width digits
        ("85", "Final answer: <value unit>", U, None, U),
        ("85", "Final answer: NaN", U, None, U),
        ("85", "Final answer: Infinity", U, None, U),
        ("85", "Final answer: 1e9999", W, "1e9999", W),  # an exponent of four digits is read as a unit
        ("12", "Final answer: \u202e21", U, None, W),  # an override shows 12
    ),
    # --- limits: MedCalc-Bench's, both included; its golds name no unit, and none is judged
    *numbers(
        ("25.24", "Final answer: 23.978", C, "23.978", C),
        ("25.24", "Final answer: 26.502 kg/m²", C, "26.502 kg/m²", C),
        ("25.24", "Final answer: 25 %", C, "25 %", C),
        ("25.24", "Final answer: 26.5021", W, "26.5021", W),
        ("25.24", "Final answer: 2524", W, "2524", W),
        ("25.24", "Final answer: 26 mL/min/1.73 m²", C, "26 mL/min/1.73 m²", C),
        ("25.24", "Final answer: 25 kg/m^2", C, "25 kg/m^2", C),
        ("25.24", "Final answer: 25 mg kg^-1", C, "25 mg kg^-1", C),
        ("25.24", "Final answer: 24 to 26", U, None, C),  # with any unit, the next number would be one
        ("25.24", "Final answer: 25 or 2", U, None, C),
        ("25.24", "Final answer: 25 kg/m² or 30 kg/m²", U, None, C),
        ("25.24", "Final answer: 25 (rounded)", U, None, C),
        ("25.24", "Final answer: 25 × 10^3", W, "25 × 10^3", C),
        ("25.24", "25.2", U, None, C),
        allowance=Allowance(limits=("23.978", "26.502"), any_unit=True),
    ),
    *numbers(
        ("7.40", "Final answer: 7.36", C, "7.36", C),
        ("7.40", "Final answer: 7.44", C, "7.44", C),
        ("7.40", "Final answer: 7.45", W, "7.45", W),
        ("7.40", "Final answer: 7.40 mmol/L", W, "7.40 mmol/L", C),
        allowance=Allowance(limits=("7.36", "7.44")),
    ),
]

TEXTS = [
    *texts(
        ("Metabolic acidosis", "Final answer: metabolic  ACIDOSIS.", C, "metabolic  ACIDOSIS.", C),
        ("Metabolic acidosis", "**Final answer:** Metabolic acidosis", C, "Metabolic acidosis", C),
        ("Metabolic acidosis", "Final answer: a metabolic acidosis", C, "a metabolic acidosis", C),
        ("the spleen", "Final answer: Spleen", C, "Spleen", C),
        ("An infarct", "Final answer: the infarct", C, "the infarct", C),
        ("2026-11-22", "Final answer: 2026-11-22", C, "2026-11-22", C),
        ("beta-blocker", "Final answer: β blocker", C, "β blocker", C),
        ("TNF-α inhibitor", "Final answer: TNFα inhibitor", C, "TNFα inhibitor", C),
        ("β2-agonist", "Final answer: beta-2 agonist", C, "beta-2 agonist", C),
        ("Guillain-Barré syndrome", "Final answer: Guillain–Barre syndrome", C, "Guillain–Barre syndrome", C),
        ("Sjögren's syndrome", "Final answer: Sjogren’s syndrome", C, "Sjogren’s syndrome", C),
        ("B-cell lymphoma", "Final answer: B cell lymphoma", C, "B cell lymphoma", C),
        ("E. coli", "Final answer: E. coli.", C, "E. coli.", C),
        ("Metformin", 'Final answer: "Metformin."', C, '"Metformin."', C),
        # --- wrong, however alike
        ("Metabolic acidosis", "Final answer: metabolic alkalosis", W, "metabolic alkalosis", W),
        ("Metabolic acidosis", "Final answer: not metabolic acidosis", W, "not metabolic acidosis", W),
        ("Metabolic acidosis", "Final answer: acidosis", W, "acidosis", W),
        ("Hypokalemia", "Final answer: hyperkalemia", W, "hyperkalemia", W),
        ("HBsAg", "Final answer: HBsAg-", W, "HBsAg-", C),  # lenient errs
        ("HBsAg-", "Final answer: HBsAg+", W, "HBsAg+", W),
        ("A antigen", "Final answer: antigen", W, "antigen", W),
        ("A-delta fibers", "Final answer: delta fibers", W, "delta fibers", W),
        ("Hepatitis A", "Final answer: hepatitis", W, "hepatitis", W),
        ("1-2", "Final answer: 1 2", W, "1 2", W),
        ("kidney stone", "Final answer: kidney stones", W, "kidney stones", W),  # no plural, unless an alias says so
        ("CD4", "Final answer: CD8", W, "CD8", W),
        ("No murmur", "Final answer: murmur", W, "murmur", W),
        # --- right to a reader, and not the text; lenient finds it
        ("Acidosis", "Final answer: acidosis with compensation", W, "acidosis with compensation", C),
        ("Metformin", "Final answer: Metformin (Glucophage)", W, "Metformin (Glucophage)", C),
        ("Metformin", "Final answer: B. Metformin", W, "B. Metformin", C),
        ("Metformin", "Final answer: metformin, not insulin", W, "metformin, not insulin", C),
        ("Metformin", "Final answer: insulin rather than metformin", W, "insulin rather than metformin", W),
        ("Metformin", "Final answer: insulin or metformin", W, "insulin or metformin", C),  # lenient errs
        # --- no line as asked for
        ("yes", "Yes", U, None, C),
        ("Metformin", "The answer is metformin.", U, None, C),
        ("Metformin", "\\boxed{\\text{metformin}}", U, None, C),
        ("Metformin", "Give metformin.\nAvoid insulin.", U, None, W),
        ("Metformin", "Final answer: .", U, None, U),
        ("Metformin", "Final answer: insulin Final answer: metformin", U, None, C),
        ("Metformin", "Final answer: metformin\nFinal answer: insulin", U, None, W),
    ),
    *texts(
        ("Myocardial infarction", "Final answer: heart attack", C, "heart attack", C),
        ("Myocardial infarction", "Final answer: an MI", C, "an MI", C),
        ("Myocardial infarction", "Final answer: MI.", C, "MI.", C),
        ("Myocardial infarction", "Final answer: heart attacks", W, "heart attacks", W),
        ("Myocardial infarction", "Final answer: heart failure", W, "heart failure", W),
        aliases=("heart attack", "MI"),
    ),
    *texts(
        ("08/31/2023", "Final answer: 8/31/2023", C, "8/31/2023", C),
        ("08/31/2023", "Final answer: 31/08/2023", W, "31/08/2023", W),
        ("08/31/2023", "Final answer: 08/31/2024", W, "08/31/2024", W),
        aliases=("8/31/2023", "2023-08-31"),
    ),
]

NASTY = [*EXPLICIT, *UNREAD_LETTERS, *NO_OPTIONS, *THINKING, *YESNO, *NUMBERS, *TEXTS]
