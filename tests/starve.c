/* starve.c: the sparge program whose allocation number STARVE in the environment, from 0, fails. */
#include <stdlib.h>

#include "tests/heap.h"

__attribute__((constructor)) static void starve(void)
{
    const char *const which = getenv("STARVE");
    if (which)
        heap_arm(atoll(which));
}
