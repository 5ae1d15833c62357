// SPDX-License-Identifier: GPL-2.0-only
/*
 * What C headers keep inline or in macros, as functions for Rust.
 */

#include <linux/mm.h>
#include <linux/numa.h>

#include "bindings_helper.h"

#ifdef CONFIG_X86
#include <asm/cpufeature.h>

bool pmem_helper_cpu_has_clwb(void)
{
	return boot_cpu_has(X86_FEATURE_CLWB);
}

bool pmem_helper_cpu_has_clflushopt(void)
{
	return boot_cpu_has(X86_FEATURE_CLFLUSHOPT);
}
#else
bool pmem_helper_cpu_has_clwb(void)
{
	return false;
}

bool pmem_helper_cpu_has_clflushopt(void)
{
	return false;
}
#endif

int pmem_helper_phys_to_online_node(phys_addr_t start)
{
	return numa_map_to_online_node(phys_to_target_node(start));
}

void *pmem_helper_page_address(const struct page *page)
{
	return page_address(page);
}
