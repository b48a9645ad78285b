"""Words that people write for what a renderer draws under a plainer name.

The sentence encoder that ours learns from knows that sprinting is running. But it does not know
that ruby is a red: it has rare names of colours near each other, whatever their hue. So ours is
taught to read each of these words as the plain one: for a colour, as the nearest that is drawn.
"""

from __future__ import annotations

_WORDS = {
    # colours
    "red": "crimson scarlet ruby burgundy maroon cherry vermilion carmine oxblood garnet brick",
    "orange": "tangerine apricot amber pumpkin mandarin peach terracotta",
    "yellow": "lemon mustard gold canary saffron ochre",
    "green": "emerald olive lime jade mint chartreuse pistachio",
    "turquoise": "teal aqua cyan aquamarine petrol",
    "blue": "azure cobalt sapphire cerulean ultramarine cornflower",
    "navy": "midnight indigo",
    "purple": "violet lavender lilac plum mauve magenta amethyst aubergine",
    "pink": "rose salmon fuchsia coral blush",
    "brown": "chocolate chestnut bronze hazel mahogany caramel sienna umber brunette",
    "grey": "gray charcoal silver slate graphite ashen",
    "black": "ebony onyx jet",
    "white": "ivory snowy alabaster",
    "beige": "cream sandy khaki ecru taupe buff",
    # clothes
    "sweater": "jumper pullover sweatshirt hoodie cardigan",
    "tshirt": "tee",
    "trousers": "pants jeans slacks leggings chinos sweatpants",
    "shorts": "bermudas",
    "shoes": "sneakers trainers",
    # hair, floors
    "blond": "blonde flaxen",
    "ginger": "auburn copper",
    "wooden": "parquet laminate hardwood",
    "carpet": "rug",
}
PLAIN = {word: plain for plain, words in _WORDS.items() for word in words.split()}
SYNONYMS = {plain: tuple(words.split()) for plain, words in _WORDS.items()}

# Further words that a prompt for a clip of a person may have, which the sentence encoder knows.
OTHERS = (
    "sprinting sprints sprint dashing racing jogging jogs trotting galloping strolling strolls "
    "wandering wanders marching marches ambling pacing striding tiptoeing sneaking limping hiking "
    "leaping leaps hopping hops skipping bouncing bounding vaulting diving twirling twirls "
    "whirling rotating pirouetting pirouette twisting swirling waltzing grooving swaying boogie "
    "ballet breakdancing boxing boxes jabbing jab hitting striking slapping fighting sparring "
    "karate kungfu taekwondo kickboxing tumbling tumbles somersault somersaults somersaulting "
    "handspring handstand flipping flips gymnastics gymnast acrobat acrobatics creeping creeps "
    "slithering squatting kneeling sitting standing rising lying stretching waving clapping yoga "
    "exercising training bald bearded curly wavy ponytail braid bangs beard moustache haired "
    "skinned freckled slender skinny muscular chubby tall tiny elderly young teenager teenage "
    "toddler kid kids adult grandma grandpa gentleman dude fellow ninja boxer runner jogger "
    "athlete dancer acrobatic performer jacket coat blouse vest jersey turtleneck polo tank tunic "
    "dress skirt gown suit tuxedo uniform kimono robe overalls dungarees pyjamas leotard socks "
    "stockings tights boots sandals barefoot heels slippers belt scarf gloves hat cap beanie "
    "helmet glasses sunglasses sleeve sleeved sleeveless striped stripes stripy plaid checked "
    "dotted polka patterned plain denim leather wool woolen knitted cotton silk baggy tight loose "
    "colour color coloured colored colourful colorful bright dark pale vivid neon pastel shiny "
    "matte monochrome lawn grassy meadow pasture garden backyard playground stadium gym gymnasium "
    "studio dojo corridor hallway kitchen bedroom basement attic rooftop street sidewalk pavement "
    "plaza beach desert forest jungle snow ice concrete asphalt gravel dirt mud sand marble stone "
    "linoleum floorboards planks tiles tiled tile rug mat wallpaper plaster curtain window sunny "
    "cloudy overcast foggy rainy stormy sunset sunrise dusk dawn twilight night daylight sunlight "
    "sunlit moonlight lamplight candlelight spotlight lit dimly brightly warmly gloomy shady "
    "shadowy sideways diagonal profile frontal viewed closeup camera footage clip animation "
    "cartoon realistic blurry grainy noisy ugly deformed quickly slowly gracefully energetically "
    "wildly calmly happily angrily"
)
