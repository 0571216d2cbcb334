import pytest

from jaxml.tune import facts


def test_taught_and_new_countries_and_phrasings_do_not_overlap():
    q = facts.make(countries=20, new_countries=10, seed=1)
    taught, new = {x.country for x in q.train}, {x.country for x in q.new_countries}
    assert len(taught) == 20 and len(new) == 10 and not taught & new
    assert {x.country for x in q.held_out} == taught
    assert not {x.question for x in q.train} & {x.question for x in q.held_out}
    trained = {(x.relation, x.phrasing) for x in q.train}
    assert not trained & {(x.relation, x.phrasing) for x in q.held_out + q.new_countries}
    answers = {(x.country, x.relation): x.answer for x in q.train}
    assert all(answers[x.country, x.relation] == x.answer for x in q.held_out)
    assert facts.make(countries=20, new_countries=10, seed=1) == q != facts.make(countries=20, new_countries=10, seed=2)


def test_known_facts_are_there():
    table = facts.read_countries()
    assert len(table) > 150
    assert table["France"] == {
        "capital": "Paris",
        "currency": "EUR",
        "calling code": "+33",
        "demonym": "French",
        "subregion": "Western Europe",
    }


def test_currencies_are_money_of_today():
    table = facts.read_countries()
    paid = {
        "Chile": "CLP", "Uruguay": "UYU", "Switzerland": "CHF", "Belarus": "BYN", "Zambia": "ZMW", "Croatia": "EUR",
        "Bulgaria": "EUR", "El Salvador": "USD",
    }  # fmt: skip
    assert {country: table[country]["currency"] for country in paid} == paid
    codes = {answers["currency"] for answers in table.values()}
    assert not codes & (facts.NO_MONEY | set(facts.REPLACED))


@pytest.mark.parametrize("said, wanted", [("São Tomé.", "sao tome"), (" The Valley ", "Valley"), ("+ 33", "+ 33")])
def test_exact_match_forgives_case_accents_and_punctuation_only(said, wanted):
    assert facts.normalise(said) == facts.normalise(wanted)
    assert facts.normalise("Paris, France") != facts.normalise("Paris")


def test_wilson_interval():
    low, high = facts.Accuracy(8, 10).interval
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert facts.Accuracy(0, 10).interval[0] == 0.0 and facts.Accuracy(10, 10).interval[1] == pytest.approx(1.0)


def test_more_countries_than_there_are_and_unknown_relations_are_refused():
    with pytest.raises(ValueError, match="countries"):
        facts.make(countries=400)
    with pytest.raises(ValueError, match="anthem"):
        facts.make(relations=["anthem"])


def test_at_least_one_country_is_taught():
    with pytest.raises(ValueError, match="at least one country is taught, got 0"):
        facts.make(countries=0)
