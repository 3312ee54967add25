// The processors that this process may compute on, and how many of them at once.
#pragma once

#include <string>
#include <vector>

namespace moert {

struct NumaNode {
    std::vector<int> cpus;
    int physical_cores = 0;
};

struct CpuLimits {
    std::vector<int> cpus;     // logical ones that the process may run on, ascending
    int physical_cores = 0;    // those that `cpus` belong to
    double quota_cpus = 0;     // CPU time per second allowed by the tightest cgroup; infinity where none sets a quota
    std::string quota_source;  // the file that states it
    std::vector<NumaNode> nodes;  // `cpus`, split; at least one
};

// The affinity mask of the calling thread, ascending; throws std::runtime_error where the kernel refuses it.
std::vector<int> allowed_cpus();

// What a process that may run on `cpus` finds below `root`, which stands for "/": sysfs for cores and nodes; for the
// quota the process's own cgroup and every ancestor, v1 and v2. Files that are missing or make no sense limit nothing.
CpuLimits cpu_limits(const std::string& root, std::vector<int> cpus);

// One thread for each physical core, but no more than the quota keeps busy; *why says which of the two decided.
int default_threads(const CpuLimits& limits, std::string* why);

// "0-3,8" as the kernel writes it; empty if it is anything else.
std::vector<int> parse_cpu_list(const std::string& text);

// The node of each of `count` threads: shares in proportion to the nodes' cores, dealt out in turn.
std::vector<int> spread_over_nodes(const std::vector<NumaNode>& nodes, int count);

// Has the calling thread run on these CPUs only; false, and no change, where the kernel refuses.
bool bind_thread(const std::vector<int>& cpus);

}  // namespace moert
