/* SPDX-License-Identifier: Apache-2.0 */
/* interrupt.h: SIGINT, SIGTERM and SIGHUP. They end a program with EXIT_UNFINISHED and one line, at
 * once; or, while something waits for them, when that has seen to its end. A second one never
 * waits. */
#ifndef SPARGE_TOOLS_INTERRUPT_H
#define SPARGE_TOOLS_INTERRUPT_H

#include <stdbool.h>

#define INTERRUPTED "interrupted; give the same command again"

/* From here on; but what is ignored (by nohup) stays ignored. */
void interrupt_catch(const char *name);

/* Who waits asks interrupt_came now and then. What came and was not asked for ends the program when
 * nobody waits any more. */
void interrupt_wait(bool waits);
bool interrupt_came(void);

#endif
