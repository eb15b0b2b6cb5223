"""General knowledge: the capital of a country.

What is held out: (country, wording) pairs. Every country is trained on in some wordings and tested in one that it
was never seen with, so the score says how many capitals the adapter has learnt well enough to give them when asked
otherwise. It does not say that capitals of unseen countries can be predicted: nothing could infer those. The marking is
lenient towards a model that answers in a whole sentence: the capital has to occur in the first line.

Countries with a disputed capital, with several or with none by law, and those named like their capital are left out.
"""

from __future__ import annotations

from functools import cache

from flylora.lab.tasks.base import Example, Split, Task
from flylora.lab.tasks.facts import Fact, split_by_wording

VERSION = "1"

WORDINGS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital city of {}.",
    "Which capital belongs to {}?",
    "What do you call the capital of {}?",
    "The capital of {} is which city?",
)

_CAPITALS = {
    "Africa": (
        "Algeria: Algiers; Angola: Luanda; Benin: Porto-Novo; Botswana: Gaborone; Burkina Faso: Ouagadougou; "
        "Cameroon: Yaoundé; Cape Verde: Praia; the Central African Republic: Bangui; Chad: "
        "N'Djamena; the Comoros: Moroni; the Democratic Republic of the Congo: Kinshasa; Egypt: Cairo; "
        "Eritrea: Asmara; Ethiopia: Addis Ababa; Gabon: Libreville; the Gambia: Banjul; Ghana: Accra; Guinea: "
        "Conakry; Guinea-Bissau: Bissau; Ivory Coast: Yamoussoukro; Kenya: Nairobi; Lesotho: Maseru; Liberia: "
        "Monrovia; Libya: Tripoli; Madagascar: Antananarivo; Malawi: Lilongwe; Mali: Bamako; Mauritania: "
        "Nouakchott; Mauritius: Port Louis; Morocco: Rabat; Mozambique: Maputo; Namibia: Windhoek; Niger: "
        "Niamey; Nigeria: Abuja; the Republic of the Congo: Brazzaville; Rwanda: Kigali; Senegal: Dakar; the "
        "Seychelles: Victoria; Sierra Leone: Freetown; Somalia: Mogadishu; South Sudan: Juba; Sudan: "
        "Khartoum; Tanzania: Dodoma; Togo: Lomé; Tunisia: Tunis; Uganda: Kampala; Zambia: Lusaka; Zimbabwe: "
        "Harare"
    ),
    "Asia": (
        "Afghanistan: Kabul; Armenia: Yerevan; Azerbaijan: Baku; Bahrain: Manama; Bangladesh: Dhaka; Bhutan: "
        "Thimphu; Brunei: Bandar Seri Begawan; Cambodia: Phnom Penh; China: Beijing; Georgia: Tbilisi; India: "
        "New Delhi; Iran: Tehran; Iraq: Baghdad; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana; Kuwait: "
        "Kuwait City; Kyrgyzstan: Bishkek; Laos: Vientiane; Lebanon: Beirut; Malaysia: Kuala Lumpur; the "
        "Maldives: Malé; Mongolia: Ulaanbaatar; Myanmar: Naypyidaw; Nepal: Kathmandu; North Korea: Pyongyang; "
        "Oman: Muscat; Pakistan: Islamabad; the Philippines: Manila; Qatar: Doha; Saudi Arabia: Riyadh; South "
        "Korea: Seoul; Syria: Damascus; Tajikistan: Dushanbe; Thailand: Bangkok; East Timor: Dili; Turkey: "
        "Ankara; Turkmenistan: Ashgabat; the United Arab Emirates: Abu Dhabi; Uzbekistan: Tashkent; Vietnam: "
        "Hanoi"
    ),
    "Europe": (
        "Albania: Tirana; Andorra: Andorra la Vella; Austria: Vienna; Belarus: Minsk; Belgium: Brussels; "
        "Bosnia and Herzegovina: Sarajevo; Bulgaria: Sofia; Croatia: Zagreb; Cyprus: Nicosia; the Czech "
        "Republic: Prague; Denmark: Copenhagen; Estonia: Tallinn; Finland: Helsinki; France: Paris; Germany: "
        "Berlin; Greece: Athens; Hungary: Budapest; Iceland: Reykjavik; Ireland: Dublin; Italy: Rome; Latvia: "
        "Riga; Liechtenstein: Vaduz; Lithuania: Vilnius; Malta: Valletta; "
        "Moldova: Chisinau; Montenegro: Podgorica; the Netherlands: Amsterdam; North Macedonia: Skopje; "
        "Norway: Oslo; Poland: Warsaw; Portugal: Lisbon; Romania: Bucharest; Russia: Moscow; Serbia: "
        "Belgrade; Slovakia: Bratislava; Slovenia: Ljubljana; Spain: Madrid; Sweden: Stockholm; "
        "Ukraine: Kyiv; the United Kingdom: London"
    ),
    "North America": (
        "Antigua and Barbuda: Saint John's; the Bahamas: Nassau; Barbados: Bridgetown; Belize: Belmopan; "
        "Canada: Ottawa; Costa Rica: San José; Cuba: Havana; Dominica: Roseau; the Dominican Republic: Santo "
        "Domingo; El Salvador: San Salvador; Grenada: Saint George's; Guatemala: Guatemala City; Haiti: "
        "Port-au-Prince; Honduras: Tegucigalpa; Jamaica: Kingston; Mexico: Mexico City; Nicaragua: Managua; "
        "Panama: Panama City; Saint Lucia: Castries; Saint Kitts and Nevis: Basseterre; Saint Vincent and the "
        "Grenadines: Kingstown; Trinidad and Tobago: Port of Spain; the United States: Washington, D.C."
    ),
    "Oceania": (
        "Australia: Canberra; Fiji: Suva; the Marshall Islands: Majuro; Micronesia: "
        "Palikir; New Zealand: Wellington; Palau: Ngerulmud; Papua New Guinea: Port Moresby; Samoa: Apia; the "
        "Solomon Islands: Honiara; Tonga: Nuku'alofa; Tuvalu: Funafuti; Vanuatu: Port Vila"
    ),
    "South America": (
        "Argentina: Buenos Aires; Brazil: Brasília; Chile: Santiago; Colombia: Bogotá; Ecuador: Quito; "
        "Guyana: Georgetown; Paraguay: Asunción; Peru: Lima; Suriname: Paramaribo; Uruguay: Montevideo; "
        "Venezuela: Caracas"
    ),
}


def facts() -> list[Fact]:
    """One fact for each country; its form is the continent."""
    return [
        Fact(key=country.removeprefix("the ").lower().replace(" ", "-"), form=continent, subject=country, answer=city)
        for continent, entries in _CAPITALS.items()
        for country, city in (entry.strip().split(": ") for entry in entries.split(";"))
    ]


@cache
def _splits() -> dict[Split, list[Example]]:
    return split_by_wording(facts(), dict.fromkeys(_CAPITALS, WORDINGS), f"capitals/{VERSION}")


def load(split: Split) -> list[Example]:
    """All questions of one split."""
    return _splits()[split]


TASK = Task(
    name="capitals",
    version=VERSION,
    description="Capitals of countries, asked in other words than in training",
    load=load,
    kind="generate",
    extractor="first_line",
    metric="contains",
    max_length=48,
    max_new_tokens=16,
    stop=("\nUser:",),
    sources=("Compiled for this project from common knowledge.",),
    licence="Apache-2.0",
)
