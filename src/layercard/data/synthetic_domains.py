"""The six invented worlds of the built-in data set."""

from layercard.data.synthetic_words import (
    Domain,
    Slot,
    clock,
    clock_words,
    coded,
    compound,
    count_words,
    delay_words,
    kilometre_words,
    minutes_words,
    number,
    one_of,
    price_words,
    unit_words,
)

_DAYS = {name[:3]: (f"{name}s",) for name in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")}
_EVENINGS = {name[:3]: (name,) for name in ("Wednesday", "Thursday", "Friday", "Saturday", "Sunday")}
_SEASONS = {
    "Mar-May": ("from March to May", "in spring"),
    "Apr-Jun": ("from April to June",),
    "Jun-Aug": ("from June to August", "in summer"),
    "Jul-Sep": ("from July to September",),
    "Sep-Nov": ("from September to November", "in autumn"),
}
_PLACE = compound(
    "Alder, Amber, Birch, Black, Cold, Crow, Dun, Elm, Fern, Glen, Hare, Holl, Kings, Lark, Maple, Mill, Nether, Oak, Otter, Penn, Raven, "
    "Salt, Thorn, Wether",
    "bourne, bridge, combe, cross, dale, ford, gate, ham, hurst, ley, mere, moor, stead, ton, wick, worth",
    "",
)
_BIKES = {
    "yes": ("bicycles may come along", "you can take a bicycle with you"),
    "no": ("bicycles are not allowed", "bicycles must stay behind"),
}
_MEALS = {
    "dining car": ("it has a dining car", "meals are served in the dining car"),
    "trolley": ("a trolley brings snacks", "it has snacks from a trolley"),
    "none": ("nothing to eat is sold on board", "it has no food on board"),
}
_LIGHT = {
    "sun": ("it wants full sun", "a sunny place suits it"),
    "half shade": ("it likes half shade", "it does best where the sun comes and goes"),
    "shade": ("it thrives in the shade", "a shady corner suits it"),
}
_WATER = {
    "low": ("it needs little water", "it gets by on very little water"),
    "medium": ("it wants water once a week", "a weekly watering is enough"),
    "high": ("it must never dry out", "it needs a lot of water"),
}
_TOURS = {
    "daily": ("there is a guided tour every day", "guides lead visitors round every day"),
    "weekends": ("guided tours take place at weekends", "at weekends there are guided tours"),
    "none": ("there are no guided tours", "visitors find their way without a guide"),
}
_CAFE = {"yes": ("it has a café", "there is a café in the house"), "no": ("it has no café", "there is no café")}
_DIET = {
    "vegan": ("it is vegan", "no animal products go into it"),
    "nuts": ("it contains nuts", "people with a nut allergy must leave it"),
    "dairy": ("it contains milk", "there is milk in it"),
}
_SKILL = {
    "easy": ("it is easy to make", "beginners manage it"),
    "medium": ("it takes some practice", "it is not quite a beginner's dish"),
    "hard": ("it is hard to make", "only skilled cooks should try it"),
}
_EFFORT = {
    "easy": ("it is an easy walk", "children can manage it"),
    "moderate": ("it calls for some stamina", "it is moderately hard"),
    "hard": ("it is for fit walkers only", "it is a hard walk"),
}
_DOGS = {
    "yes": ("dogs are welcome", "you may bring a dog"),
    "lead": ("dogs must be kept on a lead", "keep your dog on a lead"),
    "no": ("dogs are not allowed", "leave your dog at home"),
}
_AGE = {
    "all": ("all ages are welcome", "children may come, too"),
    "16+": ("it is for people of sixteen and over", "you must be sixteen to get in"),
    "18+": ("it is for adults only", "you must be eighteen to get in"),
}
_SEATS = {
    "yes": ("there are seats for everyone", "everybody gets a seat"),
    "no": ("there is standing room only", "the audience stands"),
}

TRAIN = Domain(
    "train",
    (
        Slot("from", _PLACE),
        Slot("to", _PLACE),
        Slot("departs", clock(6, 21), clock_words),
        Slot("via", _PLACE, chance=0.45),
        Slot("platform", number(1, 12), count_words, 0.65),
        Slot("delay", one_of("0 min", "5 min", "10 min", "15 min", "20 min", "40 min"), delay_words, 0.6),
        coded("bikes", _BIKES, 0.5),
        coded("meals", _MEALS, 0.4),
    ),
    (
        "the train from {from} to {to} leaves at {departs}",
        "at {departs} a train sets off from {from} for {to}",
        "there is a train to {to} at {departs}, which starts in {from}",
        "travellers from {from} can get to {to} on the train at {departs}",
        "the train from {from} to {to} by way of {via} leaves at {departs}",
        "a train leaves {from} at {departs} and runs through {via} to {to}",
        "go to platform {platform} for the train from {from} to {to} at {departs}",
    ),
    {
        "via": ("it passes through {via}", "the way leads through {via}"),
        "platform": ("it waits at platform {platform}", "it leaves from platform {platform}"),
        "delay": ("it is {delay}", "today it is {delay}"),
        "bikes": ("{bikes}",),
        "meals": ("{meals}",),
    },
)

PLANT = Domain(
    "plant",
    (
        Slot(
            "name",
            compound(
                "silver, dwarf, weeping, golden, northern, marsh, velvet, creeping, island, winter, painted, lesser",
                "bellwort, sorrel, foxvine, starmoss, hazelreed, lanternweed, duskrose, milkthorn, fernlily, honeyspur, moonbalm",
            ),
        ),
        Slot("kind", one_of("shrub", "climber", "herb", "grass", "fern")),
        Slot("height", number(20, 240, 20, " cm"), unit_words("centimetres"), 0.7),
        Slot("flower", one_of("white", "pale yellow", "deep blue", "crimson", "violet", "orange", "pink"), chance=0.7),
        coded("blooms", _SEASONS, 0.6),
        coded("light", _LIGHT, 0.6),
        coded("water", _WATER, 0.6),
    ),
    (
        "the {name} is a {kind}",
        "a {kind} called the {name} is on offer",
        "gardeners know the {name} as a {kind}",
        "the {name} is a {kind} with {flower} flowers",
        "the {name} is a {kind} that grows to {height}",
        "with its {flower} flowers, the {name} is a {kind} worth having",
    ),
    {
        "height": ("it grows {height} tall", "it reaches {height}"),
        "flower": ("it has {flower} flowers", "its flowers are {flower}"),
        "blooms": ("it blooms {blooms}", "one sees it in bloom {blooms}"),
        "light": ("{light}",),
        "water": ("{water}",),
    },
)

MUSEUM = Domain(
    "museum",
    (
        Slot(
            "name",
            compound(
                "Harrow, Castell, Winslow, Pembury, Orchard, Tannery, Lindqvist, Old Mint, Lighthouse, Marchetti, Quayside, Foundry",
                "Museum, House, Collection, Gallery",
            ),
        ),
        Slot("town", _PLACE, chance=0.7),
        Slot(
            "shows",
            compound(
                "antique, painted, miniature, hand-made, early, rare",
                "clocks, sea maps, glass beads, sewing machines, puppets, sextants, tea pots, carousel horses, locks and keys, kites",
            ),
        ),
        coded("closed", _DAYS, 0.6),
        Slot("entry", one_of("free", "3 EUR", "4 EUR", "6 EUR", "8 EUR", "12 EUR"), price_words, 0.7),
        coded("tours", _TOURS, 0.5),
        coded("cafe", _CAFE, 0.4),
    ),
    (
        "the {name} shows {shows}",
        "at the {name} you can see {shows}",
        "visitors to the {name} find {shows}",
        "the {name} in {town} shows {shows}",
        "anyone who likes {shows} should visit the {name} in {town}",
        "{shows} fill the rooms of the {name}",
    ),
    {
        "town": ("it stands in {town}", "its home is {town}"),
        "closed": ("it is closed on {closed}", "its doors stay shut on {closed}"),
        "entry": ("{entry}",),
        "tours": ("{tours}",),
        "cafe": ("{cafe}",),
    },
)

RECIPE = Domain(
    "recipe",
    (
        Slot(
            "dish",
            compound(
                "baked, braised, spiced, smoky, cold, roasted",
                "leek pie, parsnip soup, lentil stew, barley salad, mushroom rice, pumpkin mash, bean casserole, noodle broth",
            ),
        ),
        Slot("serves", number(2, 8), count_words),
        Slot("takes", one_of("10 min", "15 min", "20 min", "30 min", "45 min", "60 min", "75 min", "90 min"), minutes_words),
        Slot("spice", one_of("thyme", "cumin", "saffron", "ginger", "sage", "smoked paprika", "nutmeg"), chance=0.6),
        Slot("with", one_of("rye bread", "pickled beets", "apple sauce", "green salad", "sour cream", "toasted seeds"), chance=0.6),
        coded("diet", _DIET, 0.5),
        coded("level", _SKILL, 0.5),
    ),
    (
        "this {dish} serves {serves} and is ready in {takes}",
        "in {takes} you can make {dish} for {serves} people",
        "the recipe for {dish} feeds {serves} and takes {takes}",
        "{dish} for {serves} people takes {takes}",
        "the {dish}, flavoured with {spice}, serves {serves} and takes {takes}",
        "serve this {dish} for {serves}, made in {takes}, with {with}",
    ),
    {
        "spice": ("it is flavoured with {spice}", "{spice} gives it flavour"),
        "with": ("it goes well with {with}", "it tastes best with {with}"),
        "diet": ("{diet}",),
        "level": ("{level}",),
    },
)

TRAIL = Domain(
    "trail",
    (
        Slot(
            "name",
            compound(
                "Heron, Miller's, Smuggler's, Ridge, Lantern, Foxglove, Shepherd's, Quarry, Bishop's, Windmill",
                "Path, Way, Loop, Trail",
            ),
        ),
        Slot("start", _PLACE),
        Slot("length", compound("2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18", " km, .5 km", ""), kilometre_words),
        Slot("climb", number(50, 900, 50, " m"), unit_words("metres"), 0.6),
        Slot("goal", one_of("a lake", "a ruined chapel", "a watchtower", "a waterfall", "a cave", "an old mine", "an inn"), chance=0.6),
        coded("level", _EFFORT, 0.6),
        coded("dogs", _DOGS, 0.5),
        coded("season", _SEASONS, 0.4),
    ),
    (
        "the {name} starts in {start} and is {length} long",
        "from {start} the {name} runs for {length}",
        "the {name} is a walk of {length} that begins in {start}",
        "the {name} leads from {start} to {goal} over {length}",
        "walk {length} on the {name} from {start} and you come to {goal}",
        "over {length} and a climb of {climb}, the {name} sets out from {start}",
    ),
    {
        "climb": ("it climbs {climb}", "walkers gain {climb} in height"),
        "goal": ("it ends at {goal}", "at its end lies {goal}"),
        "level": ("{level}",),
        "dogs": ("{dogs}",),
        "season": ("it is at its best {season}", "many people walk it {season}"),
    },
)

CONCERT = Domain(
    "concert",
    (
        Slot(
            "band",
            compound(
                "The Quiet, The Tin, The Midnight, The Paper, The Seven, The Velvet, The Northern",
                "Lanterns, Magpies, Cartographers, Rivers, Ushers, Violets, Engines, Tides",
            ),
        ),
        Slot("plays", one_of("folk", "swing", "string quartets", "slow blues", "brass band music", "synth pop", "sea shanties")),
        Slot("venue", compound("Granary, Harbour, Corn, Orpheum, Station, Walled", "Hall, Stage, Cellar, Garden")),
        coded("day", _EVENINGS),
        Slot("starts", clock(17, 22), clock_words, 0.7),
        Slot("ticket", one_of("free", "sold out", "9 EUR", "14 EUR", "18 EUR", "25 EUR"), price_words, 0.7),
        coded("age", _AGE, 0.5),
        coded("seats", _SEATS, 0.4),
    ),
    (
        "{band} play {plays} at the {venue} on {day}",
        "on {day} {band} bring {plays} to the {venue}",
        "the {venue} has {band} with {plays} on {day}",
        "{band} play {plays} at the {venue} on {day} at {starts}",
        "on {day} at {starts} you can hear {plays} by {band} at the {venue}",
    ),
    {
        "starts": ("it starts at {starts}", "the music begins at {starts}"),
        "ticket": ("{ticket}",),
        "age": ("{age}",),
        "seats": ("{seats}",),
    },
)

DOMAINS = (TRAIN, PLANT, MUSEUM, RECIPE, TRAIL, CONCERT)
