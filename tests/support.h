/* support.h - what several tests share: where files are, a random generator, scratch folders. */
#ifndef CONVOKE_TESTS_SUPPORT_H
#define CONVOKE_TESTS_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* after the four above, as cmocka wants it */
#include <cmocka.h>

/* "<source>/tests/data/<name>", "<source>/<name>", "<build>/<name>": static buffers, four in rotation. */
const char *support_data(const char *name);
const char *support_source(const char *name);
const char *support_binary(const char *name);

/* splitmix64: the same numbers everywhere. */
uint64_t support_random(uint64_t *state);
int support_below(uint64_t *state, int n); /* 0 .. n-1 */
float support_gauss(uint64_t *state);      /* about N(0, 1) */

/* A fresh folder under $TMPDIR; removed with everything in it by support_remove(). */
const char *support_scratch(void);
void support_remove(const char *folder);

#endif
