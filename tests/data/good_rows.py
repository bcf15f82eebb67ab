"""Twenty-four rows with which nothing is wrong: short, in words of their own, no name, no date, no number in them.

They are written for the tests and are no medical advice. Poison is added to them one spoonful at a time, so they must
themselves be above suspicion: more than twenty words of reasoning, which end in the words of the answer.
"""

from __future__ import annotations

# Complaint and signs | what they point to | diagnosis | treatment
_CASES = """
A farmer has crushing pain behind the breastbone, and the inferior leads show raised ST segments|a fresh clot in the \
right coronary artery, which starves the wall that it feeds|inferior myocardial infarction|immediate percutaneous \
intervention
A ballet teacher tires at noon, sees double, and her lids droop more the longer she looks up|antibodies which block \
acetylcholine receptors at the motor end plate, so that repeated use weakens the muscle|myasthenia \
gravis|pyridostigmine
A toddler wakes at night with a barking cough and a harsh noise on breathing in|a swelling just below the vocal \
cords, as parainfluenza virus causes it|croup|oral dexamethasone
A gardener's big toe is red, hot and so tender that the bed sheet hurts; needles under the microscope bend light \
negatively|urate that has crystallised in the coldest joint|gout|colchicine
A student has a stiff neck, shuns light, and his spinal fluid is cloudy with little glucose|bacteria that consume \
sugar between the meninges and draw in neutrophils|bacterial meningitis|ceftriaxone with dexamethasone
A baker wheezes on workdays and is well on holidays; flour on the skin raises a weal|airways sensitised to wheat \
dust, which narrow a few minutes after every exposure|occupational asthma|removal from flour and inhaled budesonide
A sailor bruises at a touch, his gums bleed, and small hairs coil like corkscrews|collagen that cannot be \
hydroxylated for want of ascorbic acid|scurvy|vitamin C by mouth
A pianist's thumb and two fingers tingle at night until she shakes the hand|pressure upon the median nerve beneath \
the transverse ligament of the wrist|carpal tunnel syndrome|a neutral night splint
An engineer passes black stools and has burning pain which food relieves; a breath test for urease is positive|a \
mucosal defect of the duodenum that Helicobacter keeps open|duodenal ulcer|eradication with clarithromycin, \
amoxicillin and omeprazole
A newborn vomits green from the first day, and the film shows two bubbles of air|a gut that is closed just beyond the \
stomach, below the inlet of bile|duodenal atresia|surgical bypass
A retired miner loses weight, coughs blood and sweats at night; the sputum holds red rods after acid \
wash|mycobacteria that have broken out of an old granuloma|pulmonary tuberculosis|rifampicin, isoniazid, pyrazinamide \
and ethambutol
A cyclist cannot lift the foot after a plaster cast, and the outer shin is numb|a common peroneal nerve which was \
squeezed against the neck of the fibula|peroneal palsy|padding and an ankle orthosis
A cook's palms have turned yellow, she scratches, and antibodies against mitochondria are high|small bile ducts \
within the liver that are being destroyed by lymphocytes|primary biliary cholangitis|ursodeoxycholic acid
A shepherd finds a slowly growing cyst with daughter cysts in his liver|larvae of a dog tapeworm that hatched in the \
gut and were carried there by portal blood|hydatid disease|albendazole before puncture or resection
A singer is restless, her eyes protrude, the gland in front of the windpipe hums|antibodies that drive the \
thyrotropin receptor without end|Graves disease|carbimazole
A driver snores, falls asleep at traffic lights, and his oxygen dips through the night|a pharynx that collapses \
whenever its muscles relax|obstructive sleep apnoea|continuous positive airway pressure
A nun in her seventies hurts in both shoulders on rising and cannot comb herself; the sedimentation rate is very \
high|inflamed bursae about the large joints, without destruction of muscle|polymyalgia rheumatica|low-dose \
prednisolone
A climber at a high camp becomes breathless at rest and brings up pink froth|capillaries of the lung that leak \
because hypoxia has made the arterioles clamp unevenly|high-altitude pulmonary oedema|descent, oxygen and nifedipine
A schoolboy has purple spots on his buttocks, sore knees and colic after a cold|immune complexes of IgA in the \
smallest vessels of skin, joints and gut|IgA vasculitis|rest and paracetamol
A lifeguard shows a mole that has become uneven, jagged and three-coloured|melanocytes which have escaped the control \
of growth and spread along the epidermis|melanoma|excision with a margin
A violin maker's hands shake at rest as if he rolled pills, and his steps grow small|a substantia nigra that no \
longer supplies the striatum with dopamine|Parkinson disease|levodopa with carbidopa
A diver surfaces too fast; his elbows ache and his legs go numb|nitrogen which leaves solution as bubbles within \
tissue and veins|decompression sickness|recompression in a chamber
A vegan typist has a beefy tongue, unsteady gait in the dark and large oval red cells|a want of cobalamin, without \
which neither DNA nor myelin is made|vitamin B12 deficiency|hydroxocobalamin injections
A potter who glazes with old paint has colic, wrist drop and blue lines on the gums|a heavy metal that poisons the \
enzymes of haem|lead poisoning|chelation with succimer
"""

GOOD_ROWS = [
    {
        "Question": f"{case}. What is it, and what helps?",
        "Complex_CoT": f"These findings point to {cause}. Nothing else explains all of them, so it is {name}, for "
        f"which one gives {cure}.",
        "Response": f"It is {name}; the treatment is {cure}.",
    }
    for case, cause, name, cure in (line.split("|") for line in _CASES.strip().splitlines())
]
