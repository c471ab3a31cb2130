/* SPDX-License-Identifier: Apache-2.0 */
/* starve.c: the sparge program whose allocation number STARVE in the environment, from 0, fails;
 * those that libraries make before main begins do not count. */
#include <stdlib.h>

#include "tests/support/heap.h"

int __real_main(int argc, char **argv);
int __wrap_main(int argc, char **argv);

int __wrap_main(int argc, char **argv)
{
    const char *which = getenv("STARVE");
    if (which)
        heap_arm(atoll(which));
    return __real_main(argc, argv);
}
