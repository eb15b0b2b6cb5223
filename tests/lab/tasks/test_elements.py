from __future__ import annotations

from collections import Counter

from flylora.lab.tasks.base import SPLITS
from flylora.lab.tasks.elements import TASK, elements, facts, group


def test_there_are_118_elements_with_their_own_symbols_and_names() -> None:
    table = elements()
    assert [number for number, _, _ in table] == list(range(1, 119))
    assert len({symbol for _, symbol, _ in table}) == len({name for _, _, name in table}) == 118
    assert all(symbol[0].isupper() and symbol[1:].islower() | (len(symbol) == 1) for _, symbol, _ in table)


def test_known_elements_have_their_numbers() -> None:
    number = {symbol: number for number, symbol, _ in elements()}
    known = {
        "H": 1, "C": 6, "Na": 11, "Ar": 18, "K": 19, "Fe": 26, "Co": 27, "Ni": 28, "Br": 35, "Ag": 47, "Sn": 50,
        "Te": 52, "I": 53, "Xe": 54, "Cs": 55, "La": 57, "Lu": 71, "W": 74, "Pt": 78, "Au": 79, "Hg": 80, "Pb": 82,
        "Rn": 86, "Th": 90, "U": 92, "Pu": 94, "Lr": 103, "Cn": 112, "Og": 118,
    }  # fmt: skip
    assert {symbol: number[symbol] for symbol in known} == known


def test_groups_are_columns_of_the_periodic_table() -> None:
    symbol = {number: symbol for number, symbol, _ in elements()}
    columns = {
        "1": "H Li Na K Rb Cs Fr", "2": "Be Mg Ca Sr Ba Ra", "3": "Sc Y", "4": "Ti Zr Hf Rf", "5": "V Nb Ta Db",
        "6": "Cr Mo W Sg", "7": "Mn Tc Re Bh", "8": "Fe Ru Os Hs", "9": "Co Rh Ir Mt", "10": "Ni Pd Pt Ds",
        "11": "Cu Ag Au Rg", "12": "Zn Cd Hg Cn", "13": "B Al Ga In Tl Nh", "14": "C Si Ge Sn Pb Fl",
        "15": "N P As Sb Bi Mc", "16": "O S Se Te Po Lv", "17": "F Cl Br I At Ts", "18": "He Ne Ar Kr Xe Rn Og",
        "lanthanide": "La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu",
        "actinide": "Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr",
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for number in range(1, 119):
        found.setdefault(group(number), []).append(symbol[number])
    assert {name: " ".join(symbols) for name, symbols in found.items()} == columns


def test_an_element_is_tested_in_a_wording_that_its_property_was_never_trained_in() -> None:
    triples = {split: {tuple(example.id.split("/")) for example in TASK.examples(split)} for split in SPLITS}
    assert not triples["train"] & (triples["test"] | triples["validation"])
    assert not triples["test"] & triples["validation"]
    trained = Counter(triple[:2] for triple in triples["train"])
    assert set(trained.values()) == {2}
    assert {triple[:2] for triple in triples["test"]} <= set(trained)
    assert {example.group for example in TASK.examples("test")} == {"symbol", "number", "group"}


def test_no_wrong_choice_is_right() -> None:
    for fact in facts():
        assert len(fact.distractors) >= 3
        assert fact.answer not in fact.distractors
        assert fact.form != "number" or all(abs(int(wrong) - int(fact.answer)) <= 6 for wrong in fact.distractors)
