/* Which deliberate bug the core has in this process and its children: the number in TM_MUTANT, 0 or unset none. A variable
 * and not a macro, so that one build serves all mutants: sixteen builds of the core took a minute. */
#include "tm.h"

#include <stdlib.h>

int tm_mutant;

__attribute__((constructor)) static void choose(void)
{
    const char *number = getenv("TM_MUTANT");
    tm_mutant = number ? atoi(number) : 0;
}
